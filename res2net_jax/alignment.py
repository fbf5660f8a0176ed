"""Channels in multiples of eight, as a GPU's tensor cores take bfloat16: splits of 14 or 26 are padded with zeros.

What is padded are weights alone, never images: channels of zeros that the first convolution of a block gives stay zeros
through its norms and splits, or meet zeros in the next kernel, so that the block's output is the same.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def multiple(dtype: jnp.dtype) -> int:
    """What a split's channels should be a multiple of for a convolution in ``dtype``; 1 where it does not matter."""
    return 8 if jax.default_backend() == "gpu" and jnp.dtype(dtype).itemsize == 2 else 1


def pad(x: Array, splits: int | None, to: int, axis: int = -1) -> Array:
    """``x`` with zeros after each of ``splits`` equal parts of ``axis``, up to a multiple of ``to`` values each.

    ``x`` itself if they are that already, or if there are no splits (None).
    """
    if splits is None or x.shape[axis] // splits % to == 0:
        return x
    axis %= x.ndim
    size = x.shape[axis] // splits
    parts = x.reshape(*x.shape[:axis], splits, size, *x.shape[axis + 1 :])
    zeros = [(0, -size % to if i == axis + 1 else 0) for i in range(parts.ndim)]
    parts = jnp.pad(parts, zeros)
    return parts.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


def cut(x: Array, splits: int | None, features: int) -> Array:
    """What :func:`pad` made of a last axis of ``features`` values, without its zeros."""
    if x.shape[-1] == features:
        return x
    return x.reshape(*x.shape[:-1], splits, -1)[..., : features // splits].reshape(*x.shape[:-1], features)
