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


class Runners:
    """Each in a process of its own; a peer that fails is named on stderr and left out.

    Args:
        makers: Each is called with ``model`` and ``batch`` in its process, and gives a function to be timed.
        seconds: Of a turn, at least.
        at_once: Compile all at once, and go on while they do.

    Raises:
        RuntimeError: The first of ``makers`` fails.
    """

    def __init__(self, makers: dict[str, Callable], model: str, batch: int, seconds: float, *, at_once: bool = False):
        processes = multiprocessing.get_context("spawn")
        self._row = f"{model} at batch {batch}"
        self._first = next(iter(makers))
        self._pipes, self._started = {}, []
        try:
            for name, make in makers.items():
                self._pipes[name], its_end = processes.Pipe()
                self._started.append(processes.Process(target=_serve, args=(its_end, make, model, batch, seconds)))
                self._started[-1].start()
                its_end.close()
                if not at_once:
                    self._hear(name)
            self._silent = list(self._pipes) if at_once else []
        except BaseException:
            self.__exit__()
            raise

    def turns(self, rounds: int) -> dict[str, dict[str, list[float]]]:
        """Seconds of one execution in each of ``rounds`` turns of each runner.

        Returns:
            For ``near`` and ``far`` cores (``benchmarks.cores``) the turns that began and ended with such, if every
            runner had one; else all turns as ``mixed``, or under the empty name where nothing can tell.
        """
        turns = []
        while self._silent:
            self._hear(self._silent.pop(0))
        place = placement()
        for _ in range(rounds):
            for name in list(self._pipes):
                with contextlib.suppress(BrokenPipeError):  # killed since, as the next line hears
                    self._pipes[name].send("your turn")
                duration, before, place = self._hear(name), place, placement()
                turns.append((name, before if place == before else None, duration))
        return _by_place([turn for turn in turns if turn[0] in self._pipes])

    def _hear(self, name):
        """What ``name`` says; None, and it is left out, if that is what went wrong."""
        try:
            answer = self._pipes[name].recv()
        except EOFError:
            answer = "its process was killed; is the memory enough?"
        if not isinstance(answer, str):
            return answer
        text = f"{name} cannot run {self._row}: {answer}"
        if name == self._first:
            raise RuntimeError(text)
        print(text, file=sys.stderr)
        self._pipes.pop(name).close()
        return None

    def __enter__(self) -> "Runners":
        return self

    def __exit__(self, *error):
        for pipe in self._pipes.values():
            pipe.close()  # its process then ends
        for process in self._started:
            process.join()


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
