"""Runners that take turns, each in a process of its own: what one keeps in memory or leaves to its threads is not the
other's matter."""

import collections
import contextlib
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable

from benchmarks.cores import placement
from res2net_jax.files import first_line


def measure(
    makers: dict[str, Callable], model: str, batch: int, rounds: int, seconds: float
) -> dict[str, dict[str, list[float]]]:
    """Seconds of one execution in each turn of each runner; a peer that fails is named on stderr and left out.

    Args:
        makers: Each is called with ``model`` and ``batch`` in its process, and gives a function to be timed.
        rounds: Turns that each takes.
        seconds: Of a turn, at least.

    Returns:
        For ``near`` and ``far`` cores (``benchmarks.cores``) the turns that began and ended with such, if every runner
        had one; else all turns as ``mixed``, or under the empty name where nothing can tell.

    Raises:
        RuntimeError: The first of ``makers`` fails.
    """
    processes = multiprocessing.get_context("spawn")
    runners, started, turns = {}, [], []

    def hear(name):
        """What ``name`` says; None, and it is left out, if that is what went wrong."""
        try:
            answer = runners[name].recv()
        except EOFError:
            answer = "its process was killed; is the memory enough?"
        if not isinstance(answer, str):
            return answer
        text = f"{name} cannot run {model} at batch {batch}: {answer}"
        if name == next(iter(makers)):
            raise RuntimeError(text)
        print(text, file=sys.stderr)
        runners.pop(name).close()
        return None

    try:
        for name, make in makers.items():
            runners[name], its_end = processes.Pipe()
            started.append(processes.Process(target=_serve, args=(its_end, make, model, batch, seconds)))
            started[-1].start()
            its_end.close()
            hear(name)
        place = placement()
        for _ in range(rounds):
            for name in list(runners):
                with contextlib.suppress(BrokenPipeError):  # killed since, as the next line hears
                    runners[name].send("your turn")
                duration, before, place = hear(name), place, placement()
                turns.append((name, before if place == before else None, duration))
    finally:
        for runner in runners.values():
            runner.close()  # its process then ends
        for process in started:
            process.join()
    return _by_place([turn for turn in turns if turn[0] in runners])


def _by_place(turns):
    places = collections.defaultdict(lambda: collections.defaultdict(list))
    everywhere = collections.defaultdict(list)
    for name, place, duration in turns:
        everywhere[name].append(duration)
        if place is not None:
            places[place][name].append(duration)
    whole = {place: places[place] for place in ("", "near", "far") if places[place].keys() == everywhere.keys()}
    return whole or {"mixed": everywhere}


def _serve(pipe, make, model, batch, seconds):
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a traceback, which is for the asking process to give
    try:
        execute = make(model, batch)
        execute()  # compiles
        start = time.perf_counter()
        execute()
        repeats = max(1, round(seconds / (time.perf_counter() - start)))
        pipe.send(True)
        while pipe.recv():
            execute()  # what the runner before left in the caches is not this one's
            start = time.perf_counter()
            for _ in range(repeats):
                execute()
            pipe.send((time.perf_counter() - start) / repeats)
    except (EOFError, BrokenPipeError):  # no more turns
        pass
    except Exception as error:  # of the memory, say; each library has its own errors
        pipe.send(first_line(error))
