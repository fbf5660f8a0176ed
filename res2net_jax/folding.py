"""BatchNorm folded into the convolution before it: y = scale * (conv(x) + bias - mean) / sqrt(var + eps) + shift."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array

from res2net_jax.layers import BatchNorm

# Of a piece of a kernel, the last one 48 to 191: three times what XLA:CPU's products compute at once with AVX-512.
COLUMNS = 144
_ALIGNMENT = 64  # bytes

# Kernel and bias (or None) of a convolution; scale, bias, mean and variance of the norm.
Layer = tuple[Array, Array | None, Array, Array, Array, Array]


def fold(layers: Sequence[Layer], cut: Sequence[bool]) -> list[tuple[list[Array], Array]]:
    """The pieces of the kernel, and the bias, of each convolution that does its BatchNorm's work as well.

    Args:
        layers: Arrays anywhere, in types of any width; results are in the kernels' types.
        cut: Of each layer, whether its kernel is cut into pieces of ``COLUMNS`` output channels; else it is one.
    """
    layers, cut = tuple(layers), tuple(cut)
    if not _are_on_a_cpu(layers):
        return _by_xla(layers, cut)
    with np.errstate(all="ignore"):  # as XLA, of weights that are not finite
        return _by_numpy(layers, cut)


@functools.partial(jax.jit, static_argnames="cut")
def _by_xla(layers, cut):
    folded = []
    for layer, is_cut in zip(layers, cut):
        kernel, (scale, bias) = layer[0], _scale_and_bias(layer, jnp)
        starts = [start for start, _ in _spans(kernel, is_cut)][1:]
        folded.append((jnp.split((kernel * scale).astype(kernel.dtype), starts, axis=-1), bias))
    return folded


def _by_numpy(layers, cut):
    """Without a program to trace, or to load from the cache (``compile`` of 14w_8s then takes 0.31 s for 0.62)."""
    committed = [leaf.sharding for leaf in jax.tree.leaves(layers) if leaf.committed]
    layers = jax.tree.map(np.asarray, layers)
    spans = [_spans(layer[0], is_cut) for layer, is_cut in zip(layers, cut)]
    # One piece of memory: its first touch costs more than the arithmetic.
    left = np.empty(sum(layer[0].nbytes + _ALIGNMENT * len(pieces) for layer, pieces in zip(layers, spans)), np.uint8)
    folded = []
    for layer, pieces in zip(layers, spans):
        kernel, (scale, bias) = layer[0], _scale_and_bias(layer, np)
        kernels = []
        for start, stop in pieces:
            part = kernel[..., start:stop]
            piece, left = _take(left, part.shape, part.dtype)
            kernels.append(np.multiply(part, scale[start:stop], out=piece, casting="unsafe"))
        folded.append((kernels, bias))
    return jax.device_put(folded, committed[0] if committed else None)


def _take(memory, shape, dtype):
    """An array in ``memory``, which begins where JAX's own would, so that JAX takes it without a copy; and the rest."""
    start = -memory.ctypes.data % _ALIGNMENT
    stop = start + math.prod(shape) * dtype.itemsize
    return memory[start:stop].view(dtype).reshape(shape), memory[stop:]


def _scale_and_bias(layer, xp):
    kernel, bias, norm_scale, norm_bias, mean, var = layer
    scale = norm_scale / xp.sqrt(var + BatchNorm.eps)
    shift = norm_bias - mean * scale + (0 if bias is None else bias * scale)
    return scale, shift.astype(kernel.dtype)


def _spans(kernel, is_cut):
    """(start, stop) of the pieces; of a kernel that is cut none has fewer than 48 columns."""
    columns = kernel.shape[-1]
    starts = [0, *(range(COLUMNS, columns - 47, COLUMNS) if is_cut else ())]
    return list(zip(starts, [*starts[1:], columns]))


def _are_on_a_cpu(layers):
    """Whether numpy can read them where they are, on one device and not on a mesh, and none is being traced."""
    leaves = jax.tree.leaves(layers)
    if not all(isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return False
    devices = set().union(*(leaf.devices() for leaf in leaves))
    on_one = len(devices) == 1 and all(isinstance(leaf.sharding, SingleDeviceSharding) for leaf in leaves)
    return on_one and next(iter(devices)).platform == "cpu"
