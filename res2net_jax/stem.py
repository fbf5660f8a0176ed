"""What comes before the stages: a 7x7 convolution or three 3x3 ones, and a pool."""

from collections.abc import Callable

from flax import nnx

from res2net_jax.activations import Activation
from res2net_jax.arch import Arch
from res2net_jax.layers import BatchNorm, Conv
from res2net_jax.pooling import ANTI_ALIASING, dense_max_pool, max_pool


def stem_layers(arch: Arch, in_chans: int, act: Activation, dtypes: dict) -> Conv | nnx.List:
    """Images [b, h, w, in_chans] -> [b, h / 2, w / 2, arch.stem_channels[-1]]; a norm and an activation follow."""
    if not arch.stem_type:
        return Conv(in_chans, arch.stem_channels[0], 7, stride=2, **dtypes)
    layers, features = [], in_chans
    for i, out_features in enumerate(arch.stem_channels):
        layers += [Conv(features, out_features, 3, stride=1 if i else 2, **dtypes)]
        layers += [BatchNorm(out_features, **dtypes), act]
        features = out_features
    return nnx.List(layers[:-2])


def stem_pool(arch: Arch, act: Activation, dtypes: dict) -> Callable | nnx.List:
    """Half of the size, by the max-pool or what ``arch`` has in its place."""
    features = arch.stem_channels[-1]
    reduction = [ANTI_ALIASING[arch.aa_layer]()] if arch.aa_layer else []
    if arch.replace_stem_pool:
        conv = Conv(features, features, 3, stride=1 if reduction else 2, **dtypes)
        return nnx.List([conv, *reduction, BatchNorm(features, **dtypes), act])
    if arch.aa_layer == "avg":
        return nnx.List(reduction)
    return nnx.List([dense_max_pool, *reduction]) if reduction else max_pool
