"""Pools and anti-aliasing, each equal to its torch or timm namesake; maps are NHWC."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float


def max_pool(x: Float[Array, "b h w c"], stride: int = 2) -> Float[Array, "b h2 w2 c"]:
    """torch.nn.MaxPool2d(3, stride, padding=1); of equal values in a window the first one has the gradient."""
    return _max_pool(x, stride)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _max_pool(x, stride):
    # One axis after the other: on two cores 1.8 ms for 3.9, of [8, 112, 112, 64].
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 1, 1), (1, stride, 1, 1), ((0, 0), (1, 1), (0, 0), (0, 0)))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 3, 1), (1, 1, stride, 1), ((0, 0), (0, 0), (1, 1), (0, 0)))


@_max_pool.defjvp
def _max_pool_jvp(stride, primals, tangents):
    # By the place of the maximum, which is kept: forward and backward in 16 ms for the 71 of XLA's own (select and
    # scatter). To compare with the maximum instead would be wrong: each fusion computes x anew and may round it
    # differently, so that no entry equals the maximum.
    (x,), (x_dot,) = primals, tangents
    largest, *others = _window(x, stride, -jnp.inf)
    place = jnp.zeros(largest.shape, jnp.int8)
    for i, entry in enumerate(others, start=1):
        place = jnp.where(entry > largest, jnp.int8(i), place)
        largest = jnp.maximum(largest, entry)
    entries = enumerate(_window(x_dot, stride, 0))
    return largest, sum(jnp.where(place == i, entry, 0) for i, entry in entries)


def _window(x, stride, padding):
    """The nine entries of each 3x3 window, row by row, as arrays [b, h2, w2, c]."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=padding)
    down, across = (stride * ((size - 3) // stride) + 1 for size in x.shape[1:3])
    return [x[:, i : i + down : stride, j : j + across : stride] for i in range(3) for j in range(3)]


def dense_max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """torch.nn.MaxPool2d(3, 1, padding=1), to be followed by an anti-aliased reduction."""
    return max_pool(x, stride=1)


class AvgPool(nnx.Module):
    """torch.nn.AvgPool2d over a square window.

    Zeros of ``padding`` = (before, after) count in the mean. With ``ceil_mode`` a window may hang over
    the lower right edge, and counts only what lies inside.
    """

    def __init__(self, window: int, stride: int, *, padding: tuple[int, int] = (0, 0), ceil_mode: bool = False):
        self.window = window
        self.stride = stride
        self.padding = padding
        self.ceil_mode = ceil_mode

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        pads = [self._pad(size) for size in x.shape[1:3]]
        total = self._sum(x, pads)
        if self.ceil_mode:
            return total / self._sum(jnp.ones((1, *x.shape[1:3], 1), x.dtype), pads)
        return total / self.window**2

    def _pad(self, size):
        before, after = self.padding
        return before, after + (-(size - self.window) % self.stride if self.ceil_mode else 0)

    def _sum(self, x, pads):
        window, strides = (1, self.window, self.window, 1), (1, self.stride, self.stride, 1)
        return lax.reduce_window(x, 0.0, lax.add, window, strides, ((0, 0), *pads, (0, 0)))


class BlurPool(nnx.Module):
    """timm's BlurPool2d: a binomial 3x3 filter at stride 2 (Zhang 2019, "Making CNNs shift-invariant again").

    ``mode`` pads the edges as numpy.pad does: ``"reflect"`` or ``"constant"``.
    """

    def __init__(self, mode: str):
        self.mode = mode

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode=self.mode)
        taps = np.array([0.25, 0.5, 0.25])
        kernel = jnp.asarray(np.outer(taps, taps)[:, :, None, None], x.dtype)
        return lax.conv_general_dilated(
            x,
            jnp.tile(kernel, (1, 1, 1, x.shape[-1])),
            window_strides=(2, 2),
            padding="VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1],
        )


ANTI_ALIASING = {
    "avg": lambda: AvgPool(2, 2),
    "blur": lambda: BlurPool("reflect"),
    "blurpc": lambda: BlurPool("constant"),
}


def global_pool(x: Float[Array, "b h w c"], kind: str) -> Array:
    """timm's SelectAdaptivePool2d: [b, c], for ``"catavgmax"`` [b, 2 c], for ``""`` the map itself."""
    match kind:
        case "avg":
            return x.mean((1, 2))
        case "max":
            return x.max((1, 2))
        case "avgmax":
            return 0.5 * (x.mean((1, 2)) + x.max((1, 2)))
        case "catavgmax":
            return jnp.concatenate([x.mean((1, 2)), x.max((1, 2))], axis=-1)
    return x
