"""Activations by timm's names; each equals its torch.nn.functional namesake."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "celu": jax.nn.celu,
    "selu": jax.nn.selu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "hard_swish": jax.nn.hard_silu,
    "hard_mish": lambda x: 0.5 * x * jnp.clip(x + 2, 0, 2),
}


class Activation(nnx.Module):
    """The activation called ``name``; a module holds the name, since not all of the functions can be pickled."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, x: jax.Array) -> jax.Array:
        return ACTIVATIONS[self.name](x)

    def of_sum(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """``self(x + y)``; the way to end a residual block."""
        return relu_of_sum(x, y) if self.name == "relu" else self(x + y)


@jax.custom_jvp
def relu_of_sum(x: jax.Array, y: jax.Array) -> jax.Array:
    """``relu(x + y)``, in the form that the backend at hand computes best.

    At inference on a GPU it is computed as written. Elsewhere, and in all gradients, as ``max(x, -y) + y``: the same
    bits, except for NaN instead of 0 where y is -inf. Why: XLA:CPU computes an elementwise operation of one array, as
    relu is, again in each operation that uses it, so that every residual block of a stage would compute all sums before
    it again; and on a GPU the backward pass would store the sum beside its relu.
    """
    if jax.default_backend() == "gpu":
        return jnp.maximum(x + y, 0)  # as the product before it can take in
    return _of_two(x, y)


@jax.custom_jvp
def _of_two(x, y):
    return jnp.maximum(x, -y) + y


@_of_two.defjvp
@relu_of_sum.defjvp
def _relu_of_sum_jvp(primals, tangents):
    out = _of_two(*primals)
    return out, jnp.where(out > 0, tangents[0] + tangents[1], 0)
