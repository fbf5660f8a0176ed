"""Many pictures, read by threads, a batch at a time in bounded memory; broken ones are left out and remembered."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from res2net_jax.command_line import silence_stdout
from res2net_jax.decoding import decoded

T = TypeVar("T")
_AHEAD = 2  # batches that are read while one is computed


class Pictures:
    """Iterates over ``(paths, [read(path), ...])``, at most ``batch_size`` of each, in the order of ``paths``.

    Args:
        paths: The pictures.
        read: What is wanted of one; it raises ValueError or OSError for a broken one. Runs in threads.
        batch_size: The last batch may be smaller.
        quiet: Show no progress bar; there is none anyway where standard error is no terminal.

    Attributes:
        failures: What was said of each broken picture, in order; complete at the end.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[Path], T], batch_size: int, *, quiet: bool = False):
        self.paths, self.batch_size, self.quiet = paths, batch_size, quiet
        self.failures: list[str] = []
        self._read = read

    def __iter__(self) -> Iterator[tuple[list[Path], list[T]]]:
        batch = []
        for path, result in self._results():
            batch.append((path, result))
            if len(batch) == self.batch_size:
                yield tuple(map(list, zip(*batch)))
                batch = []
        if batch:
            yield tuple(map(list, zip(*batch)))

    def say(self, line: str) -> None:
        """Prints ``line``, if somebody still reads, without spoiling the progress bar."""
        with tqdm.external_write_mode(file=sys.stdout):
            try:
                print(line, flush=True)
            except BrokenPipeError:
                silence_stdout()

    def report(self) -> None:
        """Names the broken pictures on standard error.

        Raises:
            ValueError: All are broken.
        """
        lines = "\n".join(f"  {failure}" for failure in self.failures)
        if len(self.failures) == len(self.paths):
            if len(self.failures) == 1:
                raise ValueError(self.failures[0])
            raise ValueError(f"none of the {len(self.paths):,} pictures can be read:\n{lines}")
        if self.failures:
            count = f"{len(self.failures):,} of {len(self.paths):,} pictures"
            left = "was" if len(self.failures) == 1 else "were"
            with contextlib.suppress(BrokenPipeError):  # nobody reads it; the outputs are still to get their names
                print(f"{count} could not be read and {left} left out:\n{lines}", file=sys.stderr)

    def _results(self):
        bar = tqdm(total=len(self.paths), unit="picture", disable=True if self.quiet else None, file=sys.stderr)
        results = decoded(self.paths, self._read, ahead=_AHEAD * self.batch_size)
        with bar, contextlib.closing(results):
            for path, result in zip(self.paths, results):
                if isinstance(result, Exception):
                    text = str(result)
                    self.failures.append(text if str(path) in text else f"{path}: {text}")
                else:
                    yield path, result
                bar.update()


def stack(arrays: Sequence[Float[np.ndarray, "h w c"]], size: int) -> Float[np.ndarray, "b h w c"]:
    """A batch of ``size`` images, with zeros where there are too few: one size is one compilation."""
    batch = np.zeros((size, *arrays[0].shape), arrays[0].dtype)
    batch[: len(arrays)] = arrays
    return batch
