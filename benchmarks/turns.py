"""Runners that take turns, each in a process of its own: what one keeps in memory or leaves to its threads is not the
other's matter."""

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable

from res2net_jax.files import first_line


def measure(makers: dict[str, Callable], model: str, batch: int, rounds: int, seconds: float) -> dict[str, float]:
    """Median seconds of one execution for each runner; a peer that fails is named on stderr and left out.

    Args:
        makers: Each is called with ``model`` and ``batch`` in its process, and gives a function to be timed.
        rounds: Turns that each takes.
        seconds: Of a turn, at least.

    Raises:
        RuntimeError: The first of ``makers`` fails.
    """
    processes = multiprocessing.get_context("spawn")
    runners = {}
    try:
        for name, make in makers.items():
            runner, its_end = processes.Pipe()
            processes.Process(target=_serve, args=(its_end, make, model, batch, seconds)).start()
            its_end.close()
            try:
                problem = runner.recv()
            except EOFError:
                problem = "its process was killed; is the memory enough?"
            if problem and not runners:
                raise RuntimeError(f"{name} cannot run {model} at batch {batch}: {problem}")
            if problem:
                print(f"{name} cannot run {model} at batch {batch}: {problem}", file=sys.stderr)
            else:
                runners[name] = runner
        times = {name: [] for name in runners}
        for _ in range(rounds):
            for name, runner in runners.items():
                runner.send("your turn")
                times[name].append(runner.recv())
    finally:
        for runner in runners.values():
            runner.close()  # its process then ends
        for process in multiprocessing.active_children():
            process.join()
    return {name: statistics.median(values) for name, values in times.items()}


def _serve(pipe, make, model, batch, seconds):
    try:
        execute = make(model, batch)
        execute()  # compiles
        start = time.perf_counter()
        execute()
        repeats = max(1, round(seconds / (time.perf_counter() - start)))
    except Exception as error:  # of the memory, say; each library has its own errors
        pipe.send(first_line(error))
        return
    pipe.send(None)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        execute()  # what the runner before left in the caches is not this one's
        start = time.perf_counter()
        for _ in range(repeats):
            execute()
        pipe.send((time.perf_counter() - start) / repeats)
