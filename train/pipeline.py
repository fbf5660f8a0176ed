"""From a function of an example's number to batches: threads or worker processes, a position, an orderly end."""

import dataclasses
import gc
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import queues, resource_tracker, synchronize, util
from typing import Any

import grain
import numpy as np
from absl import flags

from res2net_jax.backend import cores
from res2net_jax.command_line import say

_MIN_SHARED_MEMORY = 2**31
_warned_of_pipes = threading.Event()


class Batches(grain.DatasetIterator):
    """Batches of one process; the position is the number of the next global step.

    As a Grain iterator it can be saved and restored by Orbax. ``get_state`` returns
    ``{"step": n, "replaced": n}``; ``set_state`` takes it, also from a run with other workers or processes.

    Args:
        example: Number of an example -> a dict of arrays. Of ``unreadable``, if it is there and not -1, the iterator
            reports ``describe(unreadable)`` on stderr. A pure function that can be pickled.
        length: Number of examples: whole batches for all processes.
        batch_size: Examples of one process in one step.
        step: The first step.
        workers: Processes that make batches. With 0, threads of this one do.
        process_index: Which of the processes that share each global batch this is.
        process_count: How many they are.
        describe: What to say of an unreadable example.
        example_bytes: Size of an example, to see whether there is enough shared memory.

    Attributes:
        replaced: Unreadable examples that this process has replaced so far.
    """

    def __init__(
        self,
        example: Callable[[int], dict[str, Any]],
        length: int,
        batch_size: int,
        step: int,
        workers: int,
        process_index: int,
        process_count: int,
        describe: Callable[[int], str] = str,
        example_bytes: int = 0,
    ):
        super().__init__()
        self._running = []
        weakref.finalize(self, self._stop, self._running)  # also at exit, while Python can still do it in peace
        if batch_size < 1:
            raise ValueError(f"the batch must have at least one example; got {batch_size}")
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index must be in range(process_count); got {process_index} of {process_count}")
        if workers < 0 or step < 0:
            raise ValueError(f"workers and start must not be negative; got {workers} and {step}")
        self.replaced = 0
        self._all = grain.MapDataset.range(length // batch_size).map(_Batch(example, batch_size))
        self._process = process_index, process_count
        self._workers = workers
        self._batch_bytes = batch_size * example_bytes
        self._step = step
        self._describe = describe
        self._described = set()

    def __len__(self) -> int:
        """Global steps that there are."""
        return len(self._all) // self._process[1]

    def __next__(self) -> dict[str, np.ndarray]:
        self.start_prefetch()
        try:
            batch = self._running[0].next()
        except RuntimeError as error:  # Grain's, of a worker that is gone
            raise OSError(
                f"a process that decodes pictures ended, perhaps for want of memory, or of room in /dev/shm ({error})"
            ) from error
        if batch is None:
            raise StopIteration
        self._step += 1
        unreadable = batch.pop("unreadable", np.array([], int))
        for index in unreadable[unreadable >= 0]:
            self._report(int(index))
        return {key: np.asarray(value) for key, value in batch.items()}  # plain arrays, still without a copy

    def start_prefetch(self) -> None:
        """Starts decoding ahead, so that the first batch is there when it is asked for."""
        self._assert_not_closed()
        if not self._running:
            self._running.append(
                _Feeder(_pipeline(self._all, self._step, self._workers, *self._process, self._batch_bytes))
            )

    def get_state(self) -> dict[str, int]:
        return {"step": self._step, "replaced": self.replaced}

    def set_state(self, state: dict[str, int]) -> None:
        self._stop(self._running)
        self._step, self.replaced = state["step"], state["replaced"]

    def close(self) -> None:
        """Ends the workers. Nothing can be read after it."""
        self._stop(self._running)
        super().close()

    @staticmethod  # where it is still there when Python, as it ends, has emptied this module
    def _stop(running):
        while running:
            running.pop().close()

    def _report(self, index):
        self.replaced += 1
        if index not in self._described:
            self._described.add(index)
            say(f"replaced a picture that cannot be read: {self._describe(index)}", sys.stderr)


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Number of a batch -> its examples, each put in its place at once.

    Grain's ``batch`` keeps them until the last is there, for which a worker takes 5 % more time.
    """

    example: Callable[[int], dict[str, Any]]
    size: int

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        batch = {}
        for place in range(self.size):
            for key, value in self.example(index * self.size + place).items():
                if place == 0:
                    batch[key] = np.empty((self.size, *np.shape(value)), np.asarray(value).dtype)
                batch[key][place] = value
        return batch


class _Feeder:
    """Runs a pipeline in a thread, one batch ahead.

    Signals are blocked in that thread, hence in all threads and worker processes that Grain starts from it: what
    is sent to the whole group (Ctrl-C, a pre-emption) reaches the main thread alone, which may still need batches.
    """

    def __init__(self, dataset):
        resource_tracker.ensure_running()  # else the first worker starts it, which unblocks the signals
        self._iterator = iter(dataset)
        self._thread = ThreadPoolExecutor(1, "batches", initializer=_block_signals)
        self._ahead = self._thread.submit(next, self._iterator, None)

    def next(self):
        batch = self._ahead.result()
        if batch is not None:
            self._ahead = self._thread.submit(next, self._iterator, None)
        return batch

    def close(self):
        # Grain's iterators may not be closed while they fetch.
        self._thread.shutdown(wait=True)
        self._iterator.close()


def _block_signals():
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})


def _pipeline(batches, step, workers, process_index, process_count, batch_bytes):
    """From batch ``step`` on, this process's share. Each worker makes whole batches, so their number is free."""
    mine = batches[step * process_count + process_index :: process_count]
    workers = min(workers, len(mine))
    if workers == 0:
        threads = min(cores(), 16)
        return mine.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain hands its flags to the workers, and fails on unparsed ones
    serial = mine.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    # Shared memory where there is plenty (a container may have 64 MB, and then a write to it kills the
    # worker); else, and for what is small, a pipe. A worker has 4.5 batches there, and an evaluation has its own.
    needed = max(_MIN_SHARED_MEMORY, 10 * workers * batch_bytes)
    free = shutil.disk_usage("/dev/shm").free if sys.platform == "linux" else needed
    roomy = free >= needed
    if not roomy and not _warned_of_pipes.is_set():
        _warned_of_pipes.set()
        say(
            f"WARNING: /dev/shm has {free / 1e9:.1f} GB free, and the workers' batches want {needed / 1e9:.1f} GB; so "
            "they go through pipes, which is slower. Remove /dev/shm/psm_* of killed runs, or start the container with "
            "--shm-size",
            sys.stderr,
        )
    options = grain.experimental.DatasetOptions(min_shm_size=2**16 if roomy else sys.maxsize)
    return grain.experimental.WithOptionsIterDataset(serial, options).mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1),
        worker_init_fn=_start_worker if roomy else _start_worker_with_pipe,
    )


def _start_worker(_index, _count):
    """A worker does not outlive its parent, however that ends."""
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _start_worker_with_pipe(index, count):
    _start_worker(index, count)
    util.Finalize(None, _leave_unwritten, exitpriority=0)


def _leave_unwritten():
    """Lets a worker that was told to stop end at once, its last batch half in the pipe, which nobody reads any more.

    Python would wait for a reader, and Grain 25 s for Python. Grain may not read what is cut off, either: hence the
    locks, which this process takes with it.
    """
    if any(event.is_set() for event in _all_of(synchronize.Event)):  # else it has failed, and the pipe says why
        for queue in _all_of(queues.Queue):
            queue.cancel_join_thread()
            queue._rlock.acquire()


def _all_of(kind):
    # All are of Grain, which keeps them to itself. Not by isinstance, which would ask what each of them claims to be.
    return [thing for thing in gc.get_objects() if type(thing) is kind]


def _die_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)
