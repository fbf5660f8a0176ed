"""3x3 convolutions in 16 multiplications for four outputs, not 36: F(2x2, 3x3).

Lavin & Gray 2015, "Fast Algorithms for Convolutional Neural Networks", section 4.1, whose names these are:
Y = A' [(G g G') * (B' d B)] A for each tile d of 4x4 inputs, which overlap by two. Over all tiles and channels, each of
the 16 is a product of matrices.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def winograd(
    x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"] | list[Float[Array, "3 i o"]]
) -> Float[Array, "b h w o"]:
    """At stride 1, padded with a zero on every side; of one dtype. The kernel may be a list of its rows."""
    return _convolve(x, _kernels(kernel))


def _convolve(x, kernels):
    batch, height, width, _ = x.shape
    down, across = tiles(x)
    products = [[tile @ k for tile, k in zip(*rows)] for rows in zip(_inputs(x), kernels)]
    outputs = [[y.reshape(batch, down, across, -1) for y in row] for row in _on_both_axes(_a_transposed, products)]
    out = jnp.stack([jnp.stack(row, axis=3) for row in outputs], axis=2)
    return out.reshape(batch, 2 * down, 2 * across, -1)[:, :height, :width]


@jax.custom_vjp
def winograd_in_training(x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "b h w o"]:
    """:func:`winograd` with gradients by the same algorithm. No forward-mode differentiation.

    Those that JAX would derive scatter each of the 16 into zeros. This is a convolution with the kernel turned round,
    and for the kernel G' [(B' d B) * (A dy A')] G, summed over the tiles.
    """
    return winograd(x, kernel)


def _forward(x, kernel):
    kernels = _kernels(kernel)
    return _convolve(x, kernels), (x, kernels)


def _backward(saved, gradient):
    x, kernels = saved
    # G of a kernel turned round is G of the kernel with its ends exchanged: 16 transforms of a step saved.
    turned = [[kernels[i][j].T for j in (3, 1, 2, 0)] for i in (3, 1, 2, 0)]
    products = [[a.T @ b for a, b in zip(*rows)] for rows in zip(_inputs(x), _outputs(gradient))]
    return _convolve(gradient, turned), jnp.stack([jnp.stack(row) for row in _on_both_axes(_g_transposed, products)])


winograd_in_training.defvjp(_forward, _backward)


def tiles(x: Float[Array, "b h w c"]) -> tuple[int, int]:
    """Tiles down and across; those at the end may reach beyond the images."""
    return -(-x.shape[1] // 2), -(-x.shape[2] // 2)


def _kernels(kernel):
    """G g G': 4 x 4 matrices [i, o]."""
    return _on_both_axes(_g, [list(row) for row in kernel])


def _inputs(x):
    """B' d B: 4 x 4 matrices [tiles, channels]."""
    (_, height, width, _), (down, across) = x.shape, tiles(x)
    x = jnp.pad(x, ((0, 0), (1, 2 * down + 1 - height), (1, 2 * across + 1 - width), (0, 0)))
    pixels = [[x[:, i : i + 2 * down : 2, j : j + 2 * across : 2] for j in range(4)] for i in range(4)]
    return _flat(_on_both_axes(_b_transposed, pixels))


def _outputs(y):
    """A y A': 4 x 4 matrices [tiles, channels], of an output's gradient."""
    (_, height, width, _), (down, across) = y.shape, tiles(y)
    y = jnp.pad(y, ((0, 0), (0, 2 * down - height), (0, 2 * across - width), (0, 0)))
    return _flat(_on_both_axes(_a, [[y[:, i::2, j::2] for j in range(2)] for i in range(2)]))


def _flat(rows):
    return [[x.reshape(-1, x.shape[-1]) for x in row] for row in rows]


def _b_transposed(d):
    return d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]


def _a_transposed(m):
    return m[0] + m[1] + m[2], m[1] - m[2] - m[3]


def _a(y):
    return y[0], y[0] + y[1], y[0] - y[1], -y[1]


def _g(k):
    outer = k[0] + k[2]
    return k[0], 0.5 * (outer + k[1]), 0.5 * (outer - k[1]), k[2]


def _g_transposed(u):
    both = 0.5 * (u[1] + u[2])
    return u[0] + both, 0.5 * (u[1] - u[2]), both + u[3]


def _on_both_axes(transform, rows):
    columns = [transform(column) for column in zip(*rows)]
    return [transform(row) for row in zip(*columns)]
