"""BatchNorm folded into the convolution before it: y = scale * (conv(x) + bias - mean) / sqrt(var + eps) + shift."""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array

from res2net_jax.layers import BatchNorm, common_type

_AT_ONCE = 48  # output channels, in XLA:CPU's products with AVX-512
COLUMNS = {1: 3 * _AT_ONCE, 3: 4 * _AT_ONCE}  # of a piece of a 1x1 or 3x3 kernel; the last has from _AT_ONCE on
_ALIGNMENT = 64  # bytes

# Kernel and bias (or None) of a convolution; scale, bias, mean and variance of the norm.
Layer = tuple[Array, Array | None, Array, Array, Array, Array]
# Of a kernel: as it is, its columns first, or a list of pieces, each of some output channels and of a single row.
Layout = Literal["HWIO", "WIHO", "pieces"]


def fold(layers: Sequence[Layer], layouts: Sequence[Layout]) -> list[tuple[list[Array], Array]]:
    """The kernel, or its pieces, and the bias of each convolution that does its BatchNorm's work as well.

    Args:
        layers: Arrays anywhere, in types of any width; results are in the kernels' types, those of 16 bits in float32.
        layouts: Of each layer's folded kernel. Pieces are in order of their rows, then of their channels, of which
            each has up to ``COLUMNS`` or a few more.
    """
    layers, layouts = tuple(layers), tuple(layouts)
    if not _are_on_a_cpu(layers):
        return _by_xla(layers, layouts)
    with np.errstate(all="ignore"):  # as XLA, of weights that are not finite
        return _by_numpy(layers, layouts)


@functools.partial(jax.jit, static_argnames="layouts")
def _by_xla(layers, layouts):
    folded = []
    for layer, layout in zip(layers, layouts):
        kernel, (scale, bias) = layer[0], _scale_and_bias(layer, jnp)
        kernel = (kernel * scale).astype(_type(kernel))
        pieces = [kernel[rows, ..., columns] for rows, columns in _pieces(kernel, layout)]
        folded.append(([piece.transpose(_axes(layout)) for piece in pieces], bias))
    return folded


def _by_numpy(layers, layouts):
    """Without a program to trace or to load from the cache: ``compile`` of 14w_8s takes 0.31 s instead of 0.62."""
    committed = [leaf.sharding for leaf in jax.tree.leaves(layers) if leaf.committed]
    layers = jax.tree.map(np.asarray, layers)
    pieces = [_pieces(layer[0], layout) for layer, layout in zip(layers, layouts)]
    # One piece of memory: its first touch costs more than the arithmetic.
    sizes = (layer[0].size * _type(layer[0]).itemsize + _ALIGNMENT * len(cuts) for layer, cuts in zip(layers, pieces))
    left = np.empty(sum(sizes), np.uint8)
    folded = []
    for layer, layout, cuts in zip(layers, layouts, pieces):
        kernel, (scale, bias) = layer[0], _scale_and_bias(layer, np)
        kernels = []
        for rows, columns in cuts:
            part, axes = kernel[rows, ..., columns], _axes(layout)
            piece, left = _take(left, [part.shape[axis] for axis in axes], _type(part))
            np.multiply(part, scale[columns], out=piece.transpose(np.argsort(axes)), casting="unsafe")
            kernels.append(piece)
        folded.append((kernels, bias))
    return jax.device_put(folded, committed[0] if committed else None)


def _take(memory, shape, dtype):
    """An array in ``memory``, which begins where JAX's own would, so that JAX takes it without a copy; and the rest."""
    start = -memory.ctypes.data % _ALIGNMENT
    stop = start + math.prod(shape) * dtype.itemsize
    return memory[start:stop].view(dtype).reshape(shape), memory[stop:]


def _scale_and_bias(layer, xp):
    kernel, *rest = layer
    bias, norm_scale, norm_bias, mean, var = (None if one is None else xp.asarray(one, _type(kernel)) for one in rest)
    scale = norm_scale / xp.sqrt(var + BatchNorm.eps)
    shift = norm_bias - mean * scale + (0 if bias is None else bias * scale)
    return scale, shift


def _type(kernel):
    """Of what is folded: rounded to 16 bits, weights would lose what a model that computes in 32 keeps."""
    return common_type(kernel.dtype, jnp.float32)


def _axes(layout):
    return (1, 2, 0, 3) if layout == "WIHO" else (0, 1, 2, 3)


def _pieces(kernel, layout):
    """The rows and the columns of each, as slices."""
    if layout != "pieces":
        return [(slice(None), slice(None))]
    size, columns = kernel.shape[0], kernel.shape[-1]
    starts = [0, *range(COLUMNS[size], columns - _AT_ONCE + 1, COLUMNS[size])]
    return [
        (slice(row, row + 1), slice(start, stop))
        for row in range(size)
        for start, stop in zip(starts, [*starts[1:], columns])
    ]


def _are_on_a_cpu(layers):
    """Whether numpy can read them where they are, on one device and not on a mesh, and none is being traced."""
    leaves = jax.tree.leaves(layers)
    if not all(isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return False
    devices = set().union(*(leaf.devices() for leaf in leaves))
    on_one = len(devices) == 1 and all(isinstance(leaf.sharding, SingleDeviceSharding) for leaf in leaves)
    return on_one and next(iter(devices)).platform == "cpu"
