"""Pools and anti-aliasing, each equal to its torch or timm namesake; maps are NHWC."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float


def max_pool(x: Float[Array, "b h w c"], stride: int = 2) -> Float[Array, "b h2 w2 c"]:
    """torch.nn.MaxPool2d(3, stride, padding=1); of equal values in a window the first one has the gradient."""
    # One axis after the other: [8, 112, 112, 64] on two cores in 1.8 ms instead of 3.9. Within the rows first, so that
    # of equal values the first is the one that comes first row by row.
    return _max_along(_max_along(x, 2, stride), 1, stride)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _max_along(x, axis, stride):
    return _reduce_along(x, axis, -jnp.inf, lax.max, 3, stride, (1, 1))


@_max_along.defjvp
def _max_along_jvp(axis, stride, primals, tangents):
    # By the place of the maximum, which is kept: forward and backward in 16 ms for the 71 of XLA's own (select and
    # scatter), and along one axis after the other in half of the time of both at once. To compare with the maximum
    # instead would be wrong: each fusion computes x anew and may round it differently, so that no entry equals it.
    (x,), (x_dot,) = primals, tangents
    first, second, third = _entries(x, axis, stride, -jnp.inf)
    largest = jnp.maximum(first, second)
    place = jnp.where(third > largest, jnp.int8(2), (second > first).astype(jnp.int8))
    entries = enumerate(_entries(x_dot, axis, stride, 0))
    return jnp.maximum(largest, third), sum(jnp.where(place == i, entry, 0) for i, entry in entries)


def _entries(x, axis, stride, padding):
    """The three entries of each window along ``axis``, as arrays of the output's shape."""
    x = jnp.pad(x, _only(axis, (1, 1), (0, 0)), constant_values=padding)
    reach = stride * ((x.shape[axis] - 3) // stride) + 1
    return [lax.slice_in_dim(x, i, i + reach, stride, axis) for i in range(3)]


def _reduce_along(x, axis, start, function, window, stride, pad):
    window, strides = _only(axis, window, 1), _only(axis, stride, 1)
    return lax.reduce_window(x, start, function, window, strides, _only(axis, pad, (0, 0)))


def _only(axis, value, others):
    """Four of ``others``, but ``value`` at ``axis``."""
    return tuple(value if i == axis else others for i in range(4))


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
        if not self.ceil_mode and min(x.shape[1:3]) + sum(self.padding) < self.window:
            raise ValueError(_too_small(x, "avg"))
        total = self._sum(x, pads)
        if self.ceil_mode:
            return total / self._sum(jnp.ones((1, *x.shape[1:3], 1), x.dtype), pads)
        return total / self.window**2

    def _pad(self, size):
        before, after = self.padding
        return before, after + (-(size - self.window) % self.stride if self.ceil_mode else 0)

    def _sum(self, x, pads):
        # One axis after the other: at stride 2 of [8, 56, 56, 96] the gradient takes 0.3 ms instead of 5.6.
        for axis, pad in zip((1, 2), pads):
            x = _reduce_along(x, axis, 0.0, lax.add, self.window, self.stride, pad)
        return x


class BlurPool(nnx.Module):
    """timm's BlurPool2d: a binomial 3x3 filter at stride 2 (Zhang 2019, "Making CNNs shift-invariant again").

    ``mode`` pads the edges as numpy.pad does: ``"reflect"`` or ``"constant"``.
    """

    def __init__(self, mode: str):
        self.mode = mode

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        if self.mode == "reflect" and min(x.shape[1:3]) < 2:
            raise ValueError(_too_small(x, "blur"))
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


def _too_small(x, name):
    height, width = x.shape[1:3]
    return f"aa_layer {name!r} has come to maps of {height} x {width} pixels, too few for it; take larger images"


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
            return _largest(x)
        case "avgmax":
            return 0.5 * (x.mean((1, 2)) + _largest(x))
        case "catavgmax":
            return jnp.concatenate([x.mean((1, 2)), _largest(x)], axis=-1)
    return x


@jax.custom_jvp
def _largest(x):
    """torch.nn.AdaptiveMaxPool2d(1); of equal values the first one has the gradient."""
    return x.max((1, 2))


@_largest.defjvp
def _largest_jvp(primals, tangents):
    # By its place, as of _max_along: JAX's own gradient compares with the maximum, and shares it among equal values.
    x, x_dot = (values.reshape(len(values), math.prod(values.shape[1:3]), -1) for values in (*primals, *tangents))
    place = jnp.argmax(x, 1, keepdims=True)
    return tuple(jnp.take_along_axis(values, place, 1)[:, 0] for values in (x, x_dot))
