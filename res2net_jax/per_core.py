"""A batch in two halves on a CPU of two cores, each half by a program of one thread.

The threads of one program wait for each other after each operation, and read what the other has just written. Two
programs have nothing but the weights in common. JAX makes one CPU client in a process, whose threads serve all of its
programs, so each of the two gets a client of its own.
"""

import contextlib
import functools
import itertools
import math
import os
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


def in_halves(run: Callable, leaves: list[jax.Array]) -> Callable:
    """``images -> run(leaves, images)``, a half of the batch on each of :func:`devices`, in parts; waits for all.

    Args:
        run: Of :func:`res2net_jax.backend.jit`. It treats each image by itself; the batch is each output's first axis.
        leaves: On one CPU device. They are not copied.
    """

    @functools.cache
    def place():
        return next((leaf.sharding for leaf in leaves if getattr(leaf, "committed", False)), None)

    @functools.cache
    def shared():
        return [[jax.device_put(np.asarray(leaf), device) for leaf in leaves] for device in devices()]

    def call(images):
        where = images.sharding if getattr(images, "committed", False) else place()
        on_each = zip(devices(), shared())
        parts = np.split(np.asarray(images), len(images) // _size(images.shape))
        answers = [  # not awaited one by one
            run.alone(leaves, jax.device_put(part, device))
            for part, (device, leaves) in zip(parts, itertools.cycle(on_each))
        ]
        return jax.tree.map(lambda *parts: jax.device_put(np.concatenate(parts), where), *answers)

    return call


def _size(shape):
    """Of a part, which divides half of the batch."""
    half = shape[0] // 2
    least = math.ceil(LEAST_PIXELS_OF_A_PART / math.prod(shape[1:3]))
    return next((size for size in range(least, half) if half % size == 0), half)


def can_halve(array: jax.Array | np.ndarray) -> bool:
    """Whether ``array`` is where :func:`in_halves` takes it from: on the host or the only CPU device, on no mesh."""
    if isinstance(array, jax.core.Tracer) or not isinstance(array, jax.Array):
        return isinstance(array, np.ndarray)
    return isinstance(array.sharding, SingleDeviceSharding) and array.sharding.device_set == {jax.devices()[0]}


def is_halved(images: jax.Array | np.ndarray) -> bool:
    """Whether ``images``, of any shape and type, are for :func:`in_halves`, and can be."""
    if jax.default_backend() != "cpu" or jax.device_count() > 1 or backend.cores() != 2:
        return False  # more cores were not measured
    if not can_halve(images) or images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
        return False
    pixels = math.prod(images.shape[1:3])
    if len(images) % 2 or pixels < LEAST_PIXELS or len(images) * pixels < LEAST_PIXELS_OF_A_BATCH:
        return False
    return not jax.config.jax_disable_jit and not backend.is_traced(images) and len(devices()) == 2


@functools.cache
def devices() -> tuple[jax.Device, ...]:
    """One of each client; none where this jaxlib, or the system, does not make such."""
    try:
        return tuple(_client(core).local_devices()[0] for core in sorted(os.sched_getaffinity(0)))
    except (AttributeError, ImportError, OSError, TypeError):
        return ()


def _client(core):
    """A CPU client of one thread: XLA starts as many as there are cores that the thread which makes it may use."""
    from jaxlib import xla_client  # as JAX itself does, without a promise to others

    allowed = os.sched_getaffinity(0)

    def make():
        before = set(os.listdir("/proc/self/task"))
        os.sched_setaffinity(0, {core})  # of this thread alone, and of those that it starts
        try:
            return xla_client.make_cpu_client()
        finally:  # Linux knows best which core is free
            for thread in {"0", *os.listdir("/proc/self/task")} - before:  # 0 is this one
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(int(thread), allowed)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(make).result()
