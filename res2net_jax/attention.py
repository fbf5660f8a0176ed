"""Channel attention at the end of a block, equal to timm's modules."""

import math

import jax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from res2net_jax.layers import Conv, common_type


class SqueezeExcite(nnx.Module):
    """timm's SEModule: a gate a channel from two layers over the pooled map (Hu et al. 2018)."""

    def __init__(self, features: int, **dtypes):
        # A sixteenth of the channels, in eighths.
        reduced = max(8, int(features / 16 + 4) // 8 * 8)
        self.fc1 = Conv(features, reduced, 1, bias=True, **dtypes)
        self.fc2 = Conv(reduced, features, 1, bias=True, **dtypes)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        pooled = x.mean((1, 2), keepdims=True)
        return x * jax.nn.sigmoid(self.fc2(jax.nn.relu(self.fc1(pooled))))


class EfficientChannelAttention(nnx.Module):
    """timm's EcaModule: a gate a channel from its neighbours in the pooled map (Wang et al. 2020, ECA-Net)."""

    def __init__(self, features: int, **dtypes):
        size = int((math.log2(features) + 1) / 2)
        self.conv = ChannelConv(max(size if size % 2 else size + 1, 3), **dtypes)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        gate = jax.nn.sigmoid(self.conv(x.mean((1, 2))))
        return x * gate[:, None, None, :]


class ChannelConv(nnx.Module):
    """torch.nn.Conv1d(1, 1, size, padding=size // 2, bias=False) along the channels; ``kernel`` is [size, 1, 1]."""

    def __init__(self, size: int, *, dtype=None, param_dtype):
        self.kernel = nnx.Param(jax.ShapeDtypeStruct((size, 1, 1), param_dtype))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b c"]) -> Float[Array, "b c"]:
        dtype = self.dtype or common_type(x.dtype, self.kernel.dtype)
        kernel = self.kernel[...].astype(dtype)
        pad = len(kernel) // 2
        layout = ("NWC", "WIO", "NWC")
        return lax.conv_general_dilated(
            x.astype(dtype)[..., None], kernel, (1,), ((pad, pad),), dimension_numbers=layout
        )[..., 0]


ATTENTION = {"se": SqueezeExcite, "eca": EfficientChannelAttention}
