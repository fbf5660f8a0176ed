"""Pictures decoded in threads, while the device works on those before them."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from res2net_jax.preprocess import Picture

T = TypeVar("T")


def decoded(
    pictures: Iterable[Picture], transform: Callable[[Picture], T], *, ahead: int
) -> Iterator[T | ValueError | OSError]:
    """``transform`` of each picture, in their order; for one that cannot be read, the error.

    Args:
        pictures: Paths, bytes or PIL images.
        transform: E.g. :func:`res2net_jax.preprocess`'s. PIL lets go of Python's lock, so threads are enough.
        ahead: How many pictures may be decoded before they are asked for, which bounds the memory.
    """

    def attempt(picture):
        try:
            return transform(picture)
        except (ValueError, OSError) as error:
            return error

    with concurrent.futures.ThreadPoolExecutor() as threads:
        waiting = collections.deque()
        try:
            for picture in pictures:
                waiting.append(threads.submit(attempt, picture))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            threads.shutdown(cancel_futures=True)
