"""What to tell XLA so that a Res2Net runs as fast as it can on the backend at hand."""

import functools
import os
from collections.abc import Callable

import jax
from jax import lax

from res2net_jax.files import cache_home

# XLA:CPU hands convolutions to a library (YNNPACK) that is slower at these shapes than its own: without it inference of
# res2net50_14w_8s at batch 8 went from 0.75 s to 0.47. Its reductions are faster and stay there.
_CPU = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
    "xla_cpu_prefer_vector_width": "512",  # where there are any so wide (AVX-512), not their halves: 1 to 3 %
}
_GPU = {
    # Else a block's first convolution and its shortcut become one product, whose halves are then copied out of it.
    "xla_gpu_dot_merger_threshold_mb": "0",
    # Its products cannot take in the sum at a block's end, as cuBLAS's can: inference of res2net50_14w_8s at batch 64
    # in 3.66 ms instead of 4.11, on an H200.
    "xla_gpu_enable_triton_gemm": "False",
}
# For a forward pass alone. By default all but convolutions are in CUDA graphs: batch 1 in 1.03 ms instead of
# 2.24, batch 64 in 3.46 instead of 3.66. A training step gains nothing.
_GPU_GRAPHS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONVOLUTION",
}


def cores() -> int:
    """Processors that this process may use; XLA starts as many threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compiler_options(backend: str | None = None, *, inference: bool = False) -> dict[str, str]:
    """Options for ``jax.jit(..., compiler_options=...)``.

    Args:
        backend: ``"cpu"``, ``"gpu"`` or ``"tpu"``; by default the one that JAX uses.
        inference: Those for a forward pass alone.

    Returns:
        Options that this jaxlib knows; empty where its defaults are best.
    """
    return dict(_options(backend or jax.default_backend(), inference))


@functools.cache
def _options(backend, inference):
    options = {"cpu": _CPU, "gpu": _GPU | (_GPU_GRAPHS if inference else {})}.get(backend, {})
    if _are_known(tuple(options.items())):
        return options
    return {name: value for name, value in options.items() if _are_known(((name, value),))}


@functools.cache
def _are_known(options):
    if not options:
        return True
    try:
        jax.jit(lambda x: x + 1, compiler_options=dict(options)).lower(1.0).compile()
    except jax.errors.JaxRuntimeError:  # another jaxlib may not have one of them
        return False
    return True


def jit(function: Callable, **options) -> Callable:
    """``jax.jit(function, **options)`` with :func:`compiler_options` for inference.

    JAX takes those at top level alone: within ``jax.jit``, ``jax.grad`` and the like it is compiled without. What is
    returned has an ``alone``, for arguments that are known to be at top level.
    """
    alone = jax.jit(function, compiler_options=compiler_options(inference=True), **options)
    within = jax.jit(function, **options)

    @functools.wraps(function)
    def call(*arguments, **named):
        return (within if is_traced(arguments, named) else alone)(*arguments, **named)

    call.lower, call.alone = alone.lower, alone
    return call


def is_traced(*trees) -> bool:
    """Whether what is computed of these arrays here becomes part of a program, as within ``jax.jit``."""
    here = lax.iota("int32", 1)  # traced too, if all is, as by jax.jit
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((here, trees)))


def use_compilation_cache() -> None:
    """Keeps what is compiled for later processes, in our cache folder unless JAX_COMPILATION_CACHE_DIR says where.

    Up to 4 GB, then what was not used for longest goes. JAX_ENABLE_COMPILATION_CACHE=false switches it off.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    folder = cache_home() / "compiled"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:  # a read-only home costs time, no more
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", 4 * 10**9)
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
