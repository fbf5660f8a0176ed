"""The Res2Net block (paper, figure 2b) and its shortcut."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from res2net_jax.activations import Activation
from res2net_jax.arch import EXPANSION, Arch, BlockPlan
from res2net_jax.attention import ATTENTION
from res2net_jax.drop import DropBlock, DropPath
from res2net_jax.layers import BatchNorm, Conv
from res2net_jax.pooling import AvgPool


class Bottle2neck(nnx.Module):
    """A bottleneck whose 3x3 convolution is a hierarchy over ``arch.scale`` splits of its channels.

    Split *i* is convolved together with the output of split *i - 1*, so each split sees a larger
    field than the one before; the last split passes by (paper, equation 1). In the first block of a
    stage the splits are independent, and the last one is average-pooled to the stage's size.
    """

    def __init__(self, in_features: int, plan: BlockPlan, arch: Arch, stage: int, **dtypes):
        width, out_features = arch.width(plan.planes), plan.planes * EXPANSION
        convolved = max(1, arch.scale - 1)
        self.scale = arch.scale
        self.act = Activation(arch.act_layer)
        self.is_first = plan.stride > 1 or in_features != out_features

        # What may be padded (alignment). In groups the kernels' shapes say which channels belong together.
        one, all_splits = (1, arch.scale) if arch.cardinality == 1 else (None, None)

        self.conv1 = Conv(in_features, width * arch.scale, 1, splits=(None, all_splits), **dtypes)
        self.bn1 = BatchNorm(width * arch.scale, splits=all_splits, **dtypes)
        options = {
            "stride": plan.stride,
            "dilation": plan.dilation,
            "groups": arch.cardinality,
            "splits": (one, one),
        }
        self.convs = nnx.List([Conv(width, width, 3, **options, **dtypes) for _ in range(convolved)])
        self.bns = nnx.List([BatchNorm(width, splits=one, **dtypes) for _ in range(convolved)])
        self.pool = AvgPool(3, plan.stride, padding=(1, 1)) if self.is_first else identity
        self.conv3 = Conv(width * arch.scale, out_features, 1, splits=(all_splits, None), **dtypes)
        self.bn3 = BatchNorm(out_features, **dtypes)
        self.se = ATTENTION[arch.attn_layer](out_features, **dtypes) if arch.attn_layer else identity
        self.downsample = shortcut(in_features, plan, arch, **dtypes) if self.is_first else identity

        block_size, gamma_scale = (5, 0.25) if stage == 2 else (3, 1.0)
        rate = arch.drop_block_rate if stage >= 2 else 0.0
        self.drop_block = DropBlock(rate, block_size=block_size, gamma_scale=gamma_scale)
        self.drop_path = DropPath(plan.drop_path)

    def __call__(self, x: Float[Array, "b h w i"], key: jax.Array | None = None) -> Float[Array, "b h2 w2 o"]:
        block_key, path_key = (None, None) if key is None else jax.random.split(key)
        out = self.bn1(self.conv1(x))

        outs = []
        splits = self._splits(out)
        for i, (conv, bn) in enumerate(zip(self.convs, self.bns)):
            cascade = i > 0 and not self.is_first
            part = outs[-1] + splits[i] if cascade else splits[i]
            outs.append(self.act(bn(conv(part))))
        if len(splits) > 1:
            outs.append(self.pool(splits[-1]))
        out = self.drop_block(side_by_side(outs), block_key)

        out = self.se(self.bn3(self.conv3(out)))
        return self.act.of_sum(self.drop_path(out, path_key), run(self.downsample, x))

    def _splits(self, out):
        if jax.default_backend() == "gpu":
            # The gradient masks all splits at once: of each by itself XLA would compute 8 masks for each value.
            return split(self.act(out), self.scale)
        # Each split by itself: of all together XLA would write the activations, and then copy the splits out of them.
        return [self.act(part) for part in split(out, self.scale)]


def call_block(block: nnx.Module, x: Float[Array, "b h w i"], key: jax.Array | None) -> Float[Array, "b h2 w2 o"]:
    """``block(x, key)``."""
    return block(x, key)


def checkpointed(call_block: Callable) -> Callable:
    """``call_block``, in the backward pass computed again (jax.checkpoint).

    flax.nnx.remat does so too, but writes all variables back, even those that an eval-mode model never changes and
    that the caller's jax.jit may have closed over. This writes back those that have changed.
    """

    def call(block, x, key):
        graphdef, state = nnx.split(block)

        @jax.checkpoint
        def run(state, x, key):
            block = nnx.merge(graphdef, state)
            before = {path: leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(block))}
            out = call_block(block, x, key)
            after = nnx.to_flat_state(nnx.state(block))
            changed = [(path, leaf) for path, leaf in after if leaf.get_value() is not before.get(path)]
            return out, nnx.from_flat_state(changed)

        out, changed = run(state, x, key)
        if changed:
            nnx.update(block, changed)
        return out

    return call


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def split(x: Float[Array, "b h w c"], count: int) -> list[Float[Array, "b h w c2"]]:
    """``count`` equal parts of the channels."""
    return jnp.split(x, count, axis=-1)


@split.defjvp
def _split_jvp(count, primals, tangents):
    return split(*primals, count), _computed(jnp.split(*tangents, count, axis=-1))


@jax.custom_jvp
def side_by_side(parts: list[Float[Array, "b h w c"]]) -> Float[Array, "b h w c2"]:
    """The channels of all ``parts``."""
    return jnp.concatenate(parts, axis=-1)


@side_by_side.defjvp
def _side_by_side_jvp(primals, tangents):
    return side_by_side(_computed(*primals)), jnp.concatenate(*tangents, axis=-1)


def _computed(parts):
    """``parts``, on a GPU each written to memory before they are concatenated (their gradients, before they are split).

    Fused, XLA would evaluate the expression of every part for every value and then choose one, at a tenth of the
    memory's speed ([64, 56, 56, 8 x 16] in 0.25 ms).
    """
    return jax.lax.optimization_barrier(parts) if jax.default_backend() == "gpu" else parts


def shortcut(in_features: int, plan: BlockPlan, arch: Arch, **dtypes) -> nnx.List:
    """The projection beside the first block of a stage; entries keep torch's indices."""
    out_features = plan.planes * EXPANSION
    changes_nothing = plan.stride == 1 and plan.stage_dilation == 1
    if not arch.avg_down:
        size = 1 if changes_nothing else arch.down_kernel_size
        conv = Conv(in_features, out_features, size, stride=plan.stride, dilation=plan.dilation, **dtypes)
        return nnx.List([conv, BatchNorm(out_features, **dtypes)])
    if changes_nothing:
        pool = identity
    elif plan.stride > 1:
        pool = AvgPool(2, plan.stride, ceil_mode=True)
    else:
        pool = AvgPool(2, 1, padding=(0, 1))  # timm's counts these zeros
    return nnx.List([pool, Conv(in_features, out_features, 1, **dtypes), BatchNorm(out_features, **dtypes)])


def identity(x: Array) -> Array:
    return x


def run(layers, x: Array) -> Array:
    """``layers(x)``, or a list of layers in a row."""
    for layer in layers if isinstance(layers, nnx.List) else [layers]:
        x = layer(x)
    return x
