"""Res2Net: stem, stages, head (Gao et al., "Res2Net: A New Multi-scale Backbone Architecture", 2019)."""

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from numbers import Integral

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from res2net_jax import microbatch
from res2net_jax.activations import Activation
from res2net_jax.arch import EXPANSION, Arch, override
from res2net_jax.blocks import Bottle2neck, call_block, checkpointed, run
from res2net_jax.checks import floating, natural, one_a_class, require_images
from res2net_jax.drop import Dropout
from res2net_jax.feature_info import FeatureInfo
from res2net_jax.layers import BatchNorm, Linear
from res2net_jax.pooling import global_pool
from res2net_jax.stem import stem_layers, stem_pool
from res2net_jax.variants import Preprocessing


class Res2Net(nnx.Module):
    """A Res2Net, and a pytree: pass it to jax.jit, jax.vmap or jax.device_put as it is; to train, see :meth:`train`.

    For gradients use ``nnx.grad``, which is by the parameters; ``jax.grad`` is by all arrays, running statistics too.

    The constructor only describes the model: its leaves are ``jax.ShapeDtypeStruct``.
    :func:`res2net_jax.create` fills them with fresh weights, :func:`res2net_jax.load` with trained ones.

    Args:
        arch: Architecture.
        num_classes: Width of the classifier; 0 for a model without one.
        in_chans: Channels of the images.
        dtype: Computation type, by default that of images and weights together. Batch statistics
            stay float32 (float64 in a float64 model).
        param_dtype: Type of the weights.
        name: The variant this model is or descends from.
        class_names: One name per class, if they are not ImageNet's. May be set later, to any names of that number.
        preprocessing: How pictures become images, if not as published for ``name``. May be set later.

    Attributes:
        derived_from: The variant with whose published weights its own began, as ``load`` knows; None if there is none,
            and once ``porting.load_state_dict`` has put others in.
    """

    def __init__(
        self,
        arch: Arch = Arch(),
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        dtype: jnp.dtype | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        name: str = "res2net",
        class_names: Sequence[str] | None = None,
        preprocessing: Preprocessing | None = None,
    ):
        self.name = name
        self.derived_from = None  # set by load
        self.preprocessing = preprocessing
        self.arch = arch
        self.in_chans = natural("in_chans", in_chans, least=1)
        self.dtype = None if dtype is None else floating("dtype", dtype)
        self.param_dtype = floating("param_dtype", param_dtype)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        act = Activation(arch.act_layer)
        features = arch.stem_channels[-1]
        self.conv1 = stem_layers(arch, in_chans, act, dtypes)
        self.bn1 = BatchNorm(features, **dtypes)
        self.act1 = act
        self.maxpool = stem_pool(arch, act, dtypes)
        for stage, plans in enumerate(arch.blocks):
            blocks = []
            for plan in plans:
                blocks.append(Bottle2neck(features, plan, arch, stage, **dtypes))
                features = plan.planes * EXPANSION
            setattr(self, f"layer{stage + 1}", nnx.List(blocks))
        self.head_drop = Dropout(arch.drop_rate)
        self._set_classifier(num_classes, class_names, arch)
        self.grad_checkpointing = False
        self.over_batch = microbatch.whole  # res2net_jax.compile replaces this and the next
        self.call_block = call_block

    def __call__(self, x: Float[Array, "b h w c"], key: jax.Array | None = None) -> Float[Array, "b k"]:
        """Logits; without a classifier the pooled features, without pooling the last map.

        Args:
            x: Normalised images (see :func:`res2net_jax.preprocess`), of any size.
            key: Random key, needed in train mode by dropout, DropPath and DropBlock at rates above 0.

        Raises:
            ValueError: ``x`` is not NHWC with ``in_chans`` channels, or the model holds no weights.
            TypeError: ``x`` is not floating point.
        """
        features_key, head_key = (None, None) if key is None else jax.random.split(key)
        return self.forward_head(self.forward_features(x, features_key), key=head_key)

    def forward_features(self, x: Float[Array, "b h w c"], key: jax.Array | None = None) -> Float[Array, "b h2 w2 f"]:
        """The last stage's output, before pooling."""
        return self.forward_intermediates(x, [], key=key)[0]

    def forward_head(
        self, x: Float[Array, "b h w f"], pre_logits: bool = False, *, key: jax.Array | None = None
    ) -> Array:
        """Logits from :meth:`forward_features`' output; with ``pre_logits`` the pooled features after dropout."""
        x = self.head_drop(global_pool(x, self.arch.global_pool), key)
        return x if pre_logits or self.fc is None else self.fc(x)

    def forward_intermediates(
        self,
        x: Float[Array, "b h w c"],
        indices: int | Sequence[int] | None = None,
        *,
        stop_early: bool = False,
        key: jax.Array | None = None,
    ) -> tuple[Array, list[Array]]:
        """The last stage's output and the outputs at ``indices`` of ``feature_info``, in the network's order.

        Args:
            x: Normalised images.
            indices: A list picks outputs (0 is the stem before pooling, negative counts from the
                end), a number takes the last n, None takes all.
            stop_early: Compute no stage after the last one picked; its output comes first, of the stem after pooling.
            key: As for a call of the model.

        Raises:
            ValueError: No such index; and as for a call of the model.
        """
        self.check_images(x)
        wanted = self.feature_indices(indices)
        depth = sum(self.arch.layers)
        keys = iter([None] * depth if key is None else jax.random.split(key, depth))
        area = math.prod(x.shape[1:3])
        values = [area // info["reduction"] ** 2 * info["num_chs"] for info in self.feature_info]
        outputs = []
        if 0 in wanted:
            x = self.over_batch(self._stem, x, values[0])
            outputs.append(x)
            x = run(self.maxpool, x)
        else:
            x = self.over_batch(lambda x: run(self.maxpool, self._stem(x)), x, values[0])
        for i, stage in enumerate(self.stages, start=1):
            if stop_early and wanted and i > max(wanted):
                break
            run_stage = functools.partial(self._stage, stage, list(itertools.islice(keys, len(stage))))
            x = self.over_batch(run_stage, x, values[i])
            if i in wanted:
                outputs.append(x)
        return x, outputs

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """One name per class; None for ImageNet's, or for none."""
        return self._class_names

    @class_names.setter
    def class_names(self, names: Sequence[str] | None) -> None:
        self._class_names = one_a_class(names, self.num_classes)

    @property
    def stages(self) -> list[nnx.List]:
        """The stages, as lists of blocks; a backbone may have let go of the last ones."""
        names = (f"layer{i + 1}" for i in range(len(self.arch.layers)))
        return [getattr(self, name) for name in names if hasattr(self, name)]

    @property
    def num_features(self) -> int:
        """Channels of the last stage."""
        return self.feature_info[-1]["num_chs"]

    @property
    def head_hidden_size(self) -> int:
        """Values per image after pooling."""
        return self.num_features * (2 if self.arch.global_pool == "catavgmax" else 1)

    @property
    def feature_info(self) -> FeatureInfo:
        """``num_chs``, ``reduction`` and ``module`` of the stem and of each stage, as timm's."""
        channels = [self.arch.stem_channels[-1], *(planes * EXPANSION for planes in self.arch.channels)]
        modules = ["act1", *(f"layer{i + 1}" for i in range(len(self.stages)))]
        rows = zip(channels, self.arch.reductions, modules)  # of a backbone, as far as its stages go
        return FeatureInfo(dict(zip(("num_chs", "reduction", "module"), row)) for row in rows)

    def feature_indices(self, indices: int | Sequence[int] | None = None) -> list[int]:
        """``indices`` as a sorted list of indices from 0; see :meth:`forward_intermediates`."""
        count = len(self.stages) + 1
        if indices is None:
            return list(range(count))
        if isinstance(indices, bool) or not isinstance(indices, Integral | Iterable):
            raise ValueError(f"features are picked by a number, a list of numbers or None; got {indices!r}")
        if isinstance(indices, Integral):
            if not 1 <= indices <= count:
                raise ValueError(f"the last {indices} features were asked for; this model has {count}")
            return list(range(count - indices, count))
        indices = list(indices)
        for i in indices:
            if isinstance(i, bool) or not isinstance(i, Integral):
                raise ValueError(f"features are picked by whole numbers; got {i!r}")
            if not -count <= i < count:
                raise ValueError(f"there is no feature {i}; this model has {count}, from {-count} to {count - 1}")
        return sorted({i % count for i in indices})

    def train(self, mode: bool = True) -> "Res2Net":
        """Normalises by the batch, updates the running statistics and drops from here on; returns the model.

        In train mode a call updates the running statistics of the model in place. Under ``jax.jit`` that update is
        lost unless the function returns it (``nnx.state(model, nnx.BatchStat)``, or the model); ``nnx.jit`` keeps it.

        The gradients are of reverse mode (``jax.grad``, ``jax.vjp``): on one CPU device ``jax.jvp`` raises TypeError
        where a 3x3 convolution is large enough for Winograd's algorithm. ``eval()`` allows both.
        """
        if mode and self.bn1.folded:
            raise ValueError("a fused model is for inference alone; train the one it was made from")
        self.set_attributes(use_running_average=not mode, deterministic=not mode)
        return self

    def eval(self) -> "Res2Net":
        """Normalises by the running statistics and drops nothing from here on; returns the model."""
        return self.train(False)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Computes each block's activations again in the backward pass instead of keeping them (jax.checkpoint)."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Regular expressions that sort parameter paths by depth: the stem, then the blocks (``coarse``: stages)."""
        return {"stem": r"^conv1|bn1|maxpool", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def get_classifier(self) -> Linear | None:
        """The classifier, or None."""
        return self.fc

    def reset_classifier(
        self,
        num_classes: int,
        global_pool: str | None = None,
        *,
        rngs: int | nnx.Rngs | jax.Array = 0,
        class_names: Sequence[str] | None = None,
    ) -> None:
        """Replaces the classifier by a fresh one of ``num_classes`` (0: by none), and the pooling if one is given."""
        from res2net_jax.init import initialize, seed_of, variables

        seed = seed_of(rngs)  # a bad one leaves the model as it is
        arch = self.arch if global_pool is None else override(self.arch, global_pool=global_pool)
        self._set_classifier(num_classes, class_names, arch)
        initialize(self, seed, only="fc.")
        first = jax.tree.leaves(self.conv1)[0]
        if self.fc is not None and getattr(first, "committed", False) and first.is_fully_replicated:
            for leaf in variables(self.fc).values():
                leaf.set_value(jax.device_put(leaf.get_value(), first.sharding))

    def _set_classifier(self, num_classes, class_names, arch):
        num_classes = natural("num_classes", num_classes)
        if num_classes and not arch.global_pool:
            raise ValueError('global_pool "" leaves maps, which no classifier takes; pass num_classes=0 with it')
        self._class_names = one_a_class(class_names, num_classes)
        self.arch = arch
        self.num_classes = num_classes
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.fc = nnx.data(Linear(self.head_hidden_size, num_classes, **dtypes)) if num_classes else None

    def _stem(self, x):
        return self.act1(self.bn1(run(self.conv1, x)))

    def _stage(self, blocks, keys, x):
        run_block = checkpointed(self.call_block) if self.grad_checkpointing else self.call_block
        for block, key in zip(blocks, keys):
            x = run_block(block, x, key)
        return x

    def check_images(self, x) -> None:
        """Raises what a call of the model raises for ``x``, before anything is compiled."""
        if isinstance(jax.tree.leaves(self.conv1)[0], jax.ShapeDtypeStruct):
            raise ValueError("this model only describes itself; res2net_jax.create or load gives one with weights")
        require_images(x, self.in_chans)
