"""What to tell XLA so that a Res2Net runs as fast as it can on the backend at hand."""

import functools

import jax

# XLA:CPU hands convolutions to a library (YNNPACK) that is slower at these shapes than its own; its reductions are
# faster and stay there.
_CPU = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


@functools.cache
def compiler_options(backend: str | None = None) -> dict[str, str]:
    """Options for ``jax.jit(..., compiler_options=...)``.

    Args:
        backend: ``"cpu"``, ``"gpu"`` or ``"tpu"``; by default the one that JAX uses.

    Returns:
        Options that this jaxlib knows; empty where its defaults are best.
    """
    if (backend or jax.default_backend()) != "cpu":
        return {}
    try:
        jax.jit(lambda x: x + 1, compiler_options=_CPU).lower(1.0).compile()
    except jax.errors.JaxRuntimeError:  # an experimental option, which another jaxlib may not have
        return {}
    return dict(_CPU)
