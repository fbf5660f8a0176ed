"""A trained model for inference alone: BatchNorm folded into the convolutions, compiled for its backend."""

from collections.abc import Callable

import jax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from res2net_jax.backend import compiler_options
from res2net_jax.layers import BatchNorm, Conv
from res2net_jax.model import Res2Net


def fuse(model: Res2Net) -> Res2Net:
    """``model`` with each BatchNorm folded into the convolution before it; the same function, to rounding.

    Args:
        model: In eval mode. It is not changed, and shares what is not folded.

    Returns:
        A model for inference alone, which cannot be trained, saved or exported.

    Raises:
        ValueError: ``model`` is in train mode.
    """
    _require_eval(model)
    fused = nnx.merge(*nnx.split(model))
    for module in (fused, *(block for stage in fused.stages for block in stage)):
        for name in vars(module):
            layers = getattr(module, name)
            if isinstance(layers, nnx.List):
                _fold_in_row(layers)
        for conv, bn in (("conv1", "bn1"), ("conv3", "bn3")):
            if hasattr(module, conv):
                last = getattr(module, conv)
                _fold(last[-1] if isinstance(last, nnx.List) else last, getattr(module, bn))
        if hasattr(module, "convs"):
            for conv, bn in zip(module.convs, module.bns):
                _fold(conv, bn)
    return fused


def compile(model: Res2Net) -> Callable[[Float[Array, "b h w c"]], Float[Array, "b k"]]:
    """The fast way to run a model: fused, compiled with its backend's options, called without looking at the module.

    Compiled once for every shape of images. The weights stay where they are: for several devices load the
    model with a ``sharding`` and pass images that are sharded over the batch.

    Args:
        model: In eval mode. Later changes of its weights have no effect.

    Returns:
        Images [b, h, w, c], as the model takes them, -> what ``model(images)`` gives.

    Raises:
        ValueError: ``model`` is in train mode.
    """
    return compile_function(Res2Net.__call__, model)


def compile_function(function: Callable, model: Res2Net) -> Callable:
    """As :func:`compile`, for what ``function(model, images)`` gives."""
    graphdef, state = nnx.split(fuse(model))
    leaves, structure = jax.tree.flatten(state)

    @jax.jit(compiler_options=compiler_options())
    def run(leaves, images):
        return function(nnx.merge(graphdef, jax.tree.unflatten(structure, leaves)), images)

    return lambda images: run(leaves, images)


def _fold_in_row(layers):
    for conv, bn in zip(layers, list(layers)[1:]):
        if isinstance(conv, Conv) and isinstance(bn, BatchNorm):
            _fold(conv, bn)


def _fold(conv, bn):
    """Scales the kernel by the norm and moves the shift to a bias; the norm then passes its input on."""
    if bn.folded:
        return
    scale = bn.scale[...] * lax.rsqrt(bn.var[...] + bn.eps)
    bias = bn.bias[...] - bn.mean[...] * scale
    if conv.bias is not None:
        bias = bias + conv.bias[...] * scale
    conv.kernel = nnx.Param((conv.kernel[...] * scale).astype(conv.kernel.dtype))
    conv.bias = nnx.data(nnx.Param(bias.astype(conv.kernel.dtype)))
    bn.folded = True
    for name in ("scale", "bias", "mean", "var"):
        delattr(bn, name)


def _require_eval(model):
    if not model.bn1.use_running_average:
        raise ValueError("this model is in train mode, whose norms depend on the batch; call model.eval()")
