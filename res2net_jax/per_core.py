"""A batch on a CPU of two cores, each half by programs of one thread.

The threads of one program wait for each other after each operation, and read what the other has just written. Two
programs read the same weights, and that is all. JAX makes one CPU client in a process, whose threads serve all of its
programs, so each core gets a client of its own.
"""

import contextlib
import itertools
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from res2net_jax import backend

# Of smaller pictures, or fewer, each half takes about as long as the whole: for the weights, which both read, and for
# ways to convolve that are slower for few pixels.
LEAST_PIXELS = 128 * 128
LEAST_PIXELS_OF_A_BATCH = 2 * 224 * 224
# One program for batches of 8, 16 or 32: it compiles twice as fast as one for 16 images, and is 1 to 2 % slower.
LEAST_PIXELS_OF_A_PART = 4 * 224 * 224


class Halves:
    """``images -> run(leaves, images)``, a half of the batch on each of :func:`devices`, in parts; waits for all.

    Args:
        run: Of :func:`res2net_jax.backend.jit`. It treats each image by itself; the batch is each output's first axis.
        leaves: Arrays, which are not copied.
    """

    def __init__(self, run: Callable, leaves: list[jax.Array]):
        self._run, self._leaves, self._shared = run, leaves, None
        self._are_here, self._dtypes = all(map(_is_here, leaves)), {leaf.dtype for leaf in leaves}
        committed = (leaf.sharding for leaf in leaves if getattr(leaf, "committed", False))
        self._place = next(committed, None) if self._are_here else None

    def take(self, images: jax.Array | np.ndarray) -> bool:
        """Whether two programs are faster for ``images``, of any shape and type, and possible."""
        if not self._are_here or jax.default_backend() != "cpu" or jax.device_count() > 1 or backend.cores() != 2:
            return False  # more cores were not measured
        if not _is_here(images) or images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
            return False
        pixels = math.prod(images.shape[1:3])
        if len(images) % 2 or pixels < LEAST_PIXELS or len(images) * pixels < LEAST_PIXELS_OF_A_BATCH:
            return False
        if jax.config.jax_disable_jit or backend.is_traced(images) or not jax.sharding.get_abstract_mesh().empty:
            return False
        dtypes = self._dtypes | ({images.dtype} if isinstance(images, jax.Array) else set())
        if any(dtype != jax.dtypes.canonicalize_dtype(dtype) for dtype in dtypes):
            return False  # float64 of when x64 was on; device_put would round it
        return len(devices()) == 2

    def __call__(self, images: jax.Array | np.ndarray):
        if self._shared is None:
            self._shared = [
                (device, [jax.device_put(np.asarray(leaf), device) for leaf in self._leaves]) for device in devices()
            ]
        parts = np.split(np.asarray(images), len(images) // _size(images.shape))
        answers = [  # not awaited one by one
            self._run.alone(leaves, jax.device_put(part, device))
            for part, (device, leaves) in zip(parts, itertools.cycle(self._shared))
        ]
        place = images.sharding if getattr(images, "committed", False) else self._place
        return jax.tree.map(lambda *parts: jax.device_put(np.concatenate(parts), place), *answers)


def devices() -> tuple[jax.Device, ...]:
    """One of each client, made once; none where this jaxlib, or the system, does not make such."""
    global _devices
    with _making:
        if _devices is None:
            try:
                _devices = _make_devices()
            except (AttributeError, ImportError, OSError, RuntimeError, TypeError):
                _devices = ()
        return _devices


_devices, _making = None, threading.Lock()


def _make_devices():
    allowed = os.sched_getaffinity(os.getpid())  # the process's, of which the thread that asks may have a part
    if len(allowed) != 2 or {"NPROC", "PJRT_NPROC"} & os.environ.keys():  # which tell XLA how many threads to start
        return ()
    return tuple(_client(core, allowed).local_devices()[0] for core in sorted(allowed))


def _client(core, allowed):
    """A CPU client of one thread: XLA starts as many as there are cores that the thread which makes it may use."""
    from jaxlib import xla_client  # as JAX itself does, without a promise to others

    def make():
        before, this = set(os.listdir("/proc/self/task")), str(threading.get_native_id())
        if this not in before:
            raise OSError("/proc is of other processes")
        os.sched_setaffinity(0, {core})  # of this thread alone, and of those that it starts
        try:
            return xla_client.make_cpu_client(num_devices=1)
        finally:  # Linux knows best which core is free
            for thread in {this, *os.listdir("/proc/self/task")} - (before - {this}):
                with contextlib.suppress(ProcessLookupError):
                    if os.sched_getaffinity(int(thread)) == {core}:  # others may have started threads meanwhile
                        os.sched_setaffinity(int(thread), allowed)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(make).result()


def _is_here(array):
    """Whether ``array`` is on the host or the only CPU device, and on no mesh."""
    if isinstance(array, jax.core.Tracer) or not isinstance(array, jax.Array):
        return isinstance(array, np.ndarray)
    return isinstance(array.sharding, SingleDeviceSharding) and array.sharding.device_set == {jax.devices()[0]}


def _size(shape):
    """Images of a part: the smallest divisor of half of the batch that has as many pixels as a part should have."""
    half = shape[0] // 2
    least = math.ceil(LEAST_PIXELS_OF_A_PART / math.prod(shape[1:3]))
    return next((size for size in range(least, half) if half % size == 0), half)
