"""What one image costs, counted from the traced program, in the two conventions of the field."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from res2net_jax.layers import common_type
from res2net_jax.model import Res2Net


class Cost(NamedTuple):
    """Operations for one image.

    Attributes:
        macs: Multiply-adds of the convolutions and the classifier.
        flops: The published figure's own convention: a convolution's multiply-add counts 1, batch
            normalisation 2 per output element, average pooling 1 per output element, global pooling
            H * W + 1 per channel; ReLU, max pooling and the classifier count nothing.
    """

    macs: int
    flops: int


def cost(model: Res2Net, height: int = 224, width: int = 224) -> Cost:
    """The cost of one image of ``height`` x ``width``.

    The published figures are at 224 x 285, not at the size the accuracies were measured at. ``model`` may
    be abstract, and in train mode: nothing is computed, and it is the cost in eval mode.
    """
    model = nnx.clone(model).eval()
    model.set_attributes(dtype=common_type(model.param_dtype, jnp.float32))  # on a GPU 16-bit ones are padded
    # Two images, because what does not depend on them (the counts of a ceil_mode pool) has a batch of one.
    images = jax.ShapeDtypeStruct((2, height, width, model.in_chans), model.param_dtype)
    program = jax.make_jaxpr(lambda model, x: model(x))(model, images)
    macs = flops = 0
    for equation in _equations(program.jaxpr):
        out = equation.outvars[0].aval.shape
        shapes = [variable.aval.shape for variable in equation.invars]
        match equation.primitive.name:
            case "conv_general_dilated" | "dot_general":  # a 1x1 convolution is a product of matrices
                products = math.prod(out) * math.prod(shapes[1][:-1])
                macs += products
                if len(out) != 3:  # not ECA's
                    flops += products + 2 * math.prod(out)  # every convolution has its batch normalisation
            case "reduce_window_sum" if out[0] == 2 and equation.params["window_dimensions"][2] > 1:
                # An average pool sums down the images first, then across, which gives its output.
                flops += math.prod(out)
            case "reduce_sum" if out[0] == 2:
                flops += math.prod(out) + math.prod(shapes[0])
    if model.fc is not None:  # a product of matrices too, but free
        flops -= 2 * model.num_classes * (model.head_hidden_size + 2)
    return Cost(macs // 2, flops // 2)


def count_parameters(model: Res2Net) -> int:
    """Values that training changes: all arrays but the running statistics."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def _equations(jaxpr) -> Iterator:
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)  # closed, but for a block within jax.checkpoint
            if hasattr(inner, "eqns"):
                yield from _equations(inner)
