"""A model's arrays by name, and fresh values for them."""

import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from res2net_jax.checks import natural
from res2net_jax.features import FeaturePyramid
from res2net_jax.model import Res2Net


def variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Every array of ``model`` under its path, e.g. ``"layer1.0.convs.0.kernel"``."""
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}


def require_model(model: Res2Net) -> None:
    """TypeError for anything else, such as a pyramid."""
    if not isinstance(model, Res2Net):
        kind = type(model).__name__
        hint = ""
        if isinstance(model, FeaturePyramid):
            hint = ", which was cut to a backbone; load it without features_only=True, or pass its .backbone"
        elif isinstance(model, nnx.Module):
            hint = ", a module of another class; pass the Res2Net within it"
        raise TypeError(f"expected a Res2Net; got a {kind}{hint}")


def seed_of(rngs: int | nnx.Rngs | jax.Array) -> int:
    """The seed for :func:`initialize`; ValueError for what is none."""
    key = rngs.params() if isinstance(rngs, nnx.Rngs) else rngs
    if _is_key(key):
        bits = jax.random.bits(key)
        if isinstance(bits, jax.core.Tracer):
            raise ValueError("within jax.jit and the like fresh weights need a whole number as rngs, not a key")
        rngs = int(bits)
    return natural("rngs (a seed, a key, or nnx.Rngs)", rngs)


def _is_key(value):
    """Of ``jax.random.key`` or ``jax.random.PRNGKey``."""
    if not isinstance(value, jax.Array):
        return False
    typed = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    return value.shape == () if typed else value.dtype == jnp.uint32 and value.shape == (2,)


def initialize(
    model: Res2Net, rngs: int | nnx.Rngs | jax.Array, *, zero_init_last: bool = True, only: str = ""
) -> Res2Net:
    """Fills ``model`` in place with timm's initialisation and returns it.

    2-d convolutions are normal with variance 2 / fan_out (He et al. 2015, not truncated); the classifier, biases and
    1-d convolutions uniform within +-1 / sqrt(fan_in); norms start as the identity, except that
    ``zero_init_last`` zeroes the last scale of each block, so that every block starts as its shortcut.
    Each array's numbers depend on the seed and its own path alone. numpy draws them: jax.random would
    compile one program per shape.

    Args:
        model: Its leaves may be abstract.
        rngs: Seed of the random numbers.
        zero_init_last: timm's default. The official code does not.
        only: Restricts this to arrays whose path starts so.
    """
    seed, leaves = seed_of(rngs), variables(model)
    for path, variable in leaves.items():
        if path.startswith(only):
            rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
            module, leaf = path.rsplit(".", 1)
            kernel = leaves.get(f"{module}.kernel")
            if leaf == "kernel" and len(variable.shape) == 4:
                fan_out = math.prod(variable.shape) // variable.shape[2]
                value = rng.standard_normal(variable.shape, np.float32) * np.float32(math.sqrt(2 / fan_out))
            elif kernel is not None:
                bound = 1 / math.sqrt(math.prod(kernel.shape[:-1]))
                value = rng.uniform(-bound, bound, variable.shape)
            elif leaf in ("bias", "mean") or (zero_init_last and path.endswith(".bn3.scale")):
                value = np.zeros(variable.shape)
            else:
                value = np.ones(variable.shape)
            variable.set_value(jnp.asarray(value, variable.dtype))
    return model
