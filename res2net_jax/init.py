"""A model's arrays by name, and fresh values for them."""

import math
import zlib

import jax.numpy as jnp
import numpy as np
from flax import nnx

from res2net_jax.model import Res2Net


def variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Every array of ``model`` under its path, e.g. ``"layer1.0.convs.0.kernel"``."""
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}


def initialize(model: Res2Net, seed: int, *, zero_init_last: bool = True, only: str = "") -> Res2Net:
    """Fills ``model`` in place with timm's initialisation and returns it.

    Convolutions are normal with variance 2 / fan_out (He et al. 2015, not truncated), the classifier
    uniform within +-1 / sqrt(in); norms start as the identity, except that ``zero_init_last`` zeroes
    the last scale of each block, so that every block starts as its shortcut. Each array's numbers
    depend on ``seed`` and its own path alone. numpy draws them: jax.random would compile one
    program per shape.

    Args:
        model: Its leaves may be abstract.
        seed: Seed of the random numbers.
        zero_init_last: timm's default. The official code does not.
        only: Restricts this to arrays whose path starts so.
    """
    for path, variable in variables(model).items():
        if path.startswith(only):
            rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
            value = _fresh(path, variable.shape, rng, model.num_features, zero_init_last)
            variable.set_value(jnp.asarray(value, variable.dtype))
    return model


def _fresh(path, shape, rng, num_features, zero_init_last):
    module, leaf = path.rsplit(".", 1)
    if module == "fc":
        bound = 1 / math.sqrt(num_features)
        return rng.uniform(-bound, bound, shape).astype(np.float32)
    if leaf == "kernel":
        fan_out = shape[0] * shape[1] * shape[3]
        return rng.standard_normal(shape, np.float32) * np.float32(math.sqrt(2 / fan_out))
    zero = leaf in ("bias", "mean") or (zero_init_last and path.endswith(".bn3.scale"))
    return np.zeros(shape, np.float32) if zero else np.ones(shape, np.float32)
