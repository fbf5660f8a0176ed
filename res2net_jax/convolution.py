"""Ways to compute a convolution that are equal but for rounding; which is the fastest depends on the backend.

All take images [b, h, w, i] and a square kernel [k, k, i, o] of the same dtype, and pad
``dilation * (k - 1) // 2`` zeros on every side.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def direct(
    x: Float[Array, "b h w i"], kernel: Float[Array, "k k i2 o"], *, stride: int, dilation: int, groups: int
) -> Float[Array, "b h2 w2 o"]:
    """XLA's own convolution; of one pixel, a matrix product."""
    size = kernel.shape[0]
    if size == 1 and groups == 1:
        # A matrix product says all there is to a 1x1 convolution, and XLA:CPU runs it faster (by default options,
        # inference at batch 8 in 0.57 s for 0.75, a training step in 2.9 s for 3.5). Of matrices, not of
        # [b, h, w, i]: the kernel's gradient would contract three axes, before which XLA:CPU transposes them.
        return _multiply(x[:, ::stride, ::stride], kernel[0, 0])
    pad = dilation * (size - 1) // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def on_cpu(
    x: Float[Array, "b h w i"], kernel: Float[Array, "k k i2 o"], *, stride: int, dilation: int, groups: int
) -> Float[Array, "b h2 w2 o"]:
    """The fastest of these for a forward pass on a CPU, where :func:`direct` wastes half of the peak on narrow splits.

    Of shapes that a Res2Net has; measured on two cores with AVX-512, in float32.
    """
    features = kernel.shape[2]
    tiles = len(x) * -(-x.shape[1] // 2) * -(-x.shape[2] // 2)
    if kernel.shape[0] == 3 and stride == dilation == groups == 1 and x.dtype.itemsize >= 4:
        # Its 16 products must be large enough to be worth their transforms.
        if features > 32 and tiles >= 100 and tiles * features**2 >= 2e6:
            return winograd(x, kernel)
        if features <= 64:
            return by_rows(x, kernel)
    return direct(x, kernel, stride=stride, dilation=dilation, groups=groups)


def by_rows(x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "b h w o"]:
    """A 3x3 convolution as one matrix product that is three times as wide, then a sum.

    Three neighbours of a row side by side, times the kernel's three rows side by side, are what each row of
    images adds to the rows above, at and below it. Of 14 channels the product is of 42 x 42 weights, which
    fill the processor's vectors better than the 126 x 14 of a product over all nine neighbours.
    """
    features = kernel.shape[-1]
    padded = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))
    neighbours = jnp.concatenate([padded[:, :, i : i + x.shape[2]] for i in range(3)], axis=-1)
    rows = kernel.reshape(3, -1, features).transpose(1, 0, 2).reshape(-1, 3 * features)
    below, at, above = jnp.split(_multiply(neighbours, rows), 3, axis=-1)
    below = jnp.pad(below[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
    above = jnp.pad(above[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
    return below + at + above


def winograd(x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "b h w o"]:
    """A 3x3 convolution in 16 multiplications for four outputs, not 36: F(2x2, 3x3) of Lavin & Gray, 2015.

    Y = A' [(G g G') * (B' d B)] A for each tile d of 4x4 inputs, which overlap by two (section 4.1).
    """
    batch, height, width, _ = x.shape
    down, across = -(-height // 2), -(-width // 2)
    to_kernel = jnp.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], kernel.dtype)
    kernels = jnp.einsum("ai,ijco,bj->abco", to_kernel, kernel, to_kernel)
    x = jnp.pad(x, ((0, 0), (1, 2 * down + 1 - height), (1, 2 * across + 1 - width), (0, 0)))
    tiles = [[x[:, i : i + 2 * down : 2, j : j + 2 * across : 2] for j in range(4)] for i in range(4)]
    tiles = _on_both_axes(_tile_in, tiles)
    products = [[_multiply(tile, kernels[i, j]) for j, tile in enumerate(row)] for i, row in enumerate(tiles)]
    outputs = _on_both_axes(_tile_out, products)
    out = jnp.stack([jnp.stack(row, axis=3) for row in outputs], axis=2)
    return out.reshape(batch, 2 * down, 2 * across, -1)[:, :height, :width]


def _tile_in(d):
    return d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]  # B' d


def _tile_out(m):
    return m[0] + m[1] + m[2], m[1] - m[2] - m[3]  # A' m


def _on_both_axes(transform, tile):
    columns = [transform(column) for column in zip(*tile)]
    return [transform(row) for row in zip(*columns)]


def _multiply(x, matrix):
    return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], -1)
