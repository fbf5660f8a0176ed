"""The Res2Net block (paper, figure 2b) and its shortcut."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from res2net_jax.layers import AvgPool, BatchNorm, Conv
from res2net_jax.variants import Arch

EXPANSION = 4


class Bottle2neck(nnx.Module):
    """A bottleneck whose 3x3 convolution is a hierarchy over ``arch.scale`` splits of its channels.

    Split *i* is convolved together with the output of split *i - 1*, so each split sees a larger
    field than the one before; the last split passes by (paper, equation 1). In the first block of a
    stage the splits are independent, and the last one is average-pooled to the stage's size.
    """

    def __init__(self, in_features, planes, arch: Arch, *, stride=1, downsample=None, **dtypes):
        width = arch.width(planes)
        self.scale = arch.scale
        self.is_first = downsample is not None
        self.conv1 = Conv(in_features, width * arch.scale, 1, **dtypes)
        self.bn1 = BatchNorm(width * arch.scale, **dtypes)
        convolved = max(1, arch.scale - 1)
        self.convs = nnx.List(
            [Conv(width, width, 3, stride=stride, groups=arch.cardinality, **dtypes) for _ in range(convolved)]
        )
        self.bns = nnx.List([BatchNorm(width, **dtypes) for _ in range(convolved)])
        self.pool = AvgPool(3, stride, padding=1) if self.is_first else identity
        self.conv3 = Conv(width * arch.scale, planes * EXPANSION, 1, **dtypes)
        self.bn3 = BatchNorm(planes * EXPANSION, **dtypes)
        self.downsample = downsample

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        out = jax.nn.relu(self.bn1(self.conv1(x)))

        splits = jnp.split(out, self.scale, axis=-1)
        outs = []
        for i, (conv, bn) in enumerate(zip(self.convs, self.bns)):
            cascade = i > 0 and not self.is_first
            split = outs[-1] + splits[i] if cascade else splits[i]
            outs.append(jax.nn.relu(bn(conv(split))))
        if len(splits) > 1:
            outs.append(self.pool(splits[-1]))
        out = jnp.concatenate(outs, axis=-1)

        out = self.bn3(self.conv3(out))
        shortcut = x if self.downsample is None else run(self.downsample, x)
        return jax.nn.relu(out + shortcut)


def shortcut(in_features, out_features, arch: Arch, *, stride, **dtypes) -> nnx.List:
    """The projection beside the first block of a stage; entries keep torch's indices."""
    if not arch.avg_down:
        return nnx.List(
            [Conv(in_features, out_features, 1, stride=stride, **dtypes), BatchNorm(out_features, **dtypes)]
        )
    pool = AvgPool(2, stride, ceil_mode=True) if stride > 1 else identity
    return nnx.List([pool, Conv(in_features, out_features, 1, **dtypes), BatchNorm(out_features, **dtypes)])


def identity(x: Array) -> Array:
    return x


def run(layers: nnx.List, x: Array) -> Array:
    """The layers in a row."""
    for layer in layers:
        x = layer(x)
    return x
