"""How a stage runs over a batch. What a few images take stays in a CPU's caches; what a whole batch takes does not."""

import functools
from collections.abc import Callable

import jax
from jax import lax
from jaxtyping import Array, Float

from res2net_jax.backend import cores

VALUES = 2**20  # of a stage's output for each core: near the fastest of each stage by itself, on two with AVX-512


def whole(
    stage: Callable[[Float[Array, "b h w i"]], Float[Array, "b h2 w2 o"]], x: Float[Array, "b h w i"], values: int
) -> Float[Array, "b h2 w2 o"]:
    """``stage(x)``, all images at once."""
    return stage(x)


def in_turns(
    stage: Callable[[Float[Array, "b h w i"]], Float[Array, "b h2 w2 o"]],
    x: Float[Array, "b h w i"],
    values: int,
    threads: int | None = None,
) -> Float[Array, "b h2 w2 o"]:
    """``stage(x)``, on a CPU a few images after the other, for a ``stage`` that treats each image by itself.

    Args:
        values: In the output for one image.
        threads: That share the work; by default one for each core.
    """
    batch = x.shape[0]  # symbolic in jax.export
    at_once = jax.default_backend() != "cpu" or jax.device_count() > 1 or not isinstance(batch, int)
    if at_once or (size := _size(batch, values, threads or cores())) == batch:
        return stage(x)
    out = lax.map(stage, x.reshape(-1, size, *x.shape[1:]))
    return out.reshape(-1, *out.shape[2:])


on_one_core = functools.partial(in_turns, threads=1)


def _size(batch, values, threads):
    """The most images that fit and divide the batch; all of it if those are less than half of what would fit."""
    most = max(1, VALUES * threads // max(1, values))
    if batch <= most:
        return batch
    size = next(size for size in range(most, 0, -1) if batch % size == 0)
    return size if 2 * size >= most else batch
