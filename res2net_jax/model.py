"""Res2Net: stem, stages, head (Gao et al., "Res2Net: A New Multi-scale Backbone Architecture", 2019)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from res2net_jax.blocks import EXPANSION, Bottle2neck, run, shortcut
from res2net_jax.layers import BatchNorm, Conv, Linear, max_pool
from res2net_jax.variants import Arch

STEM_FEATURES = 64


class Res2Net(nnx.Module):
    """A Res2Net, and a pytree: pass it to jax.jit, jax.grad or jax.device_put as it is.

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
        class_names: One name a class, if they are not ImageNet's.

    Attributes:
        num_features: Channels of the last stage.
        feature_info: For the stem and each stage: ``num_chs``, ``reduction``, ``module``.
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
    ):
        _require_natural(num_classes=num_classes)
        _require_natural(in_chans=in_chans, least=1)
        self.name = name
        self.arch = arch
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.class_names = None if class_names is None else tuple(class_names)
        self.dtype = None if dtype is None else jnp.dtype(dtype)
        self.param_dtype = jnp.dtype(param_dtype)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        self.conv1 = _stem(arch, in_chans, dtypes)
        self.bn1 = BatchNorm(STEM_FEATURES, **dtypes)
        features = STEM_FEATURES
        for stage, (depth, planes) in enumerate(zip(arch.layers, arch.channels)):
            blocks = []
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                downsample = None
                if stride > 1 or features != planes * EXPANSION:
                    downsample = shortcut(features, planes * EXPANSION, arch, stride=stride, **dtypes)
                blocks.append(Bottle2neck(features, planes, arch, stride=stride, downsample=downsample, **dtypes))
                features = planes * EXPANSION
            setattr(self, f"layer{stage + 1}", nnx.List(blocks))
        self.fc = Linear(features, num_classes, **dtypes) if num_classes else None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b k"]:
        """Logits, or pooled features if ``num_classes`` is 0.

        Args:
            x: Normalised images (see :func:`res2net_jax.preprocess`), of any size.

        Raises:
            ValueError: ``x`` is not NHWC with ``in_chans`` channels, or the model holds no weights.
            TypeError: ``x`` is not floating point.
        """
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h/32 w/32 f"]:
        """The last stage's output, before pooling."""
        return self.forward_intermediates(x, indices=[])[0]

    def forward_head(self, x: Float[Array, "b h w f"], pre_logits: bool = False) -> Float[Array, "b k"]:
        """Logits from :meth:`forward_features`' output; with ``pre_logits`` the pooled features."""
        x = x.mean((1, 2))
        return x if pre_logits or self.fc is None else self.fc(x)

    def forward_intermediates(
        self, x: Float[Array, "b h w c"], indices: int | Sequence[int] | None = None
    ) -> tuple[Array, list[Array]]:
        """The last stage's output and the outputs at ``indices`` of ``feature_info``.

        Args:
            x: Normalised images.
            indices: A list picks outputs (0 is the stem before pooling, negative counts from the
                end), a number takes the last n, None takes all.
        """
        self._check(x)
        wanted = self._feature_indices(indices)
        outputs = {}
        x = outputs[0] = jax.nn.relu(self.bn1(run(self.conv1, x) if self.arch.stem_type else self.conv1(x)))
        x = max_pool(x)
        for i, stage in enumerate(self.stages, start=1):
            x = outputs[i] = run(stage, x)
        return x, [outputs[i] for i in wanted]

    @property
    def stages(self) -> list[nnx.List]:
        return [getattr(self, f"layer{i + 1}") for i in range(len(self.arch.layers))]

    @property
    def num_features(self) -> int:
        return self.arch.channels[-1] * EXPANSION

    @property
    def feature_info(self) -> list[dict]:
        info = [{"num_chs": STEM_FEATURES, "reduction": 2, "module": "act1"}]
        for i, planes in enumerate(self.arch.channels):
            info.append({"num_chs": planes * EXPANSION, "reduction": 4 * 2**i, "module": f"layer{i + 1}"})
        return info

    def train(self, mode: bool = True) -> "Res2Net":
        """Normalises by the batch and updates the running statistics from here on; returns the model."""
        self.set_attributes(use_running_average=not mode)
        return self

    def eval(self) -> "Res2Net":
        """Normalises by the running statistics from here on; returns the model."""
        return self.train(False)

    def reset_classifier(self, num_classes: int, *, seed: int = 0, class_names: Sequence[str] | None = None) -> None:
        """Replaces the classifier by a freshly initialised one of ``num_classes`` (0 removes it)."""
        from res2net_jax.init import initialize

        _require_natural(num_classes=num_classes)
        self.num_classes = num_classes
        self.class_names = None if class_names is None else tuple(class_names)
        self.fc = None
        if num_classes:
            self.fc = Linear(self.num_features, num_classes, dtype=self.dtype, param_dtype=self.param_dtype)
            initialize(self, seed, only="fc")

    def _feature_indices(self, indices):
        count = len(self.arch.layers) + 1
        if indices is None:
            return list(range(count))
        if isinstance(indices, int):
            indices = range(count - indices, count)
        for i in indices:
            if not -count <= i < count:
                raise ValueError(f"there is no feature {i}; this model has {count}, from {-count} to {count - 1}")
        return [i % count for i in indices]

    def _check(self, x):
        if isinstance(self.bn1.scale.get_value(), jax.ShapeDtypeStruct):
            raise ValueError("this model only describes itself; res2net_jax.create or load gives one with weights")
        if jnp.ndim(x) != 4 or x.shape[-1] != self.in_chans:
            hint = ""
            if jnp.ndim(x) == 4 and x.shape[1] == self.in_chans:
                hint = "; this looks like NCHW, so pass x.transpose(0, 2, 3, 1)"
            elif jnp.ndim(x) == 3:
                hint = "; for a single image pass x[None]"
            raise ValueError(
                f"expected images of shape [batch, height, width, {self.in_chans}]; got {list(jnp.shape(x))}{hint}"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"expected normalised floating-point images; got {x.dtype}. "
                f'res2net_jax.preprocess("{self.name}") makes them from pictures'
            )


def _stem(arch, in_chans, dtypes):
    if not arch.stem_type:
        return Conv(in_chans, STEM_FEATURES, 7, stride=2, **dtypes)
    width = arch.stem_width
    return nnx.List(
        [
            Conv(in_chans, width, 3, stride=2, **dtypes),
            BatchNorm(width, **dtypes),
            jax.nn.relu,
            Conv(width, width, 3, **dtypes),
            BatchNorm(width, **dtypes),
            jax.nn.relu,
            Conv(width, STEM_FEATURES, 3, **dtypes),
        ]
    )


def _require_natural(*, least=0, **number):
    ((name, value),) = number.items()
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be a whole number from {least} up; got {value!r}")
