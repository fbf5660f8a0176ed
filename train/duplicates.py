"""Pictures that are in the training and in the evaluation split of a folder: they make the accuracy too high."""

import hashlib
import os
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from res2net_jax.command_line import say
from train.datasets import Dataset
from train.sources import Files

#: A look at the length of more files than this takes too long on a file system across a network.
MOST = 100_000
_HEAD = 4096


def warn_of_duplicates(train_set: Dataset, eval_set: Dataset) -> None:
    """Says on stderr how many files of ``eval_set`` are in ``train_set`` too, byte for byte, and names a few.

    Of folders alone, with at most ``MOST`` files; it reads whole only files of which another has the same
    length and the same beginning.
    """
    sources = train_set.source, eval_set.source
    if not all(isinstance(source, Files) for source in sources) or sum(map(len, sources)) > MOST:
        return
    pairs = duplicates(*sources)
    if pairs:
        some = "".join(f"\n  {there} = {here}" for here, there in pairs[:3])
        more = f"\n  and {len(pairs) - 3} more" if len(pairs) > 3 else ""
        say(
            f"WARNING: {len(pairs)} of the {len(eval_set)} pictures to evaluate on are among those to train on, so the "
            f"accuracy will be too high; remove them from one of the two:{some}{more}",
            sys.stderr,
        )


def duplicates(first: Files, second: Files) -> list[tuple[str, str]]:
    """``(path in first, path in second)`` of the files of ``second`` whose bytes are those of one in ``first``."""
    mine = {first.name(i) for i in range(len(first))}
    theirs = {second.name(i) for i in range(len(second))}
    for same in (os.path.getsize, _digest_of_head, _digest):
        groups = _groups(mine, same), _groups(theirs, same)
        common = groups[0].keys() & groups[1].keys()
        mine, theirs = ({path for key in common for path in group[key]} for group in groups)
    pairs = [(min(groups[0][key]), path) for key in common for path in groups[1][key]]
    return sorted(pairs, key=lambda pair: pair[1])


def _groups(paths: Iterable[str], key):
    groups = defaultdict(list)
    for path in sorted(paths):
        try:
            groups[key(path)].append(path)
        except OSError:  # gone or not readable: whoever decodes it says so
            continue
    return groups


def _digest_of_head(path):
    with open(path, "rb") as file:
        return os.path.getsize(path), hashlib.sha256(file.read(_HEAD)).digest()


def _digest(path):
    return hashlib.sha256(Path(path).read_bytes()).digest()
