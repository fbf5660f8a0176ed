"""What a command is given -> the pictures it means: files, folders, wildcards, a list on standard input."""

import glob
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from res2net_jax.metadata import is_checkpoint
from res2net_jax.picture_files import PICTURES, natural_key, pictures_below


def find_pictures(inputs: Iterable[str | os.PathLike]) -> list[Path]:
    """The pictures that ``inputs`` mean, input by input; those of a folder or a wildcard in natural order.

    Natural order is that of people: ``img2.jpg`` before ``img10.jpg``.

    Args:
        inputs: Each a file (whatever its name ends in), a folder (its pictures and those of its sub-folders, hidden
            ones left out), a wildcard (``*``, ``?``, ``[...]``, and ``**`` for any sub-folders) in quotes, or ``-``:
            files and folders on standard input, one a line, or each ended by a NUL as ``find -print0`` writes them.

    Raises:
        ValueError: No inputs, or a folder or a wildcard without pictures.
        FileNotFoundError: What is neither a file nor a folder, nor a wildcard.
    """
    found = []
    for text in map(os.fspath, inputs):
        if text == "-":
            names = _standard_input()
            if not names:
                raise ValueError("standard input names no pictures; write one path a line")
            for name in names:
                found += _named(name)
        else:
            found += _named(text, wildcards=True)
    if not found:
        raise ValueError(
            "no pictures given: name files, folders, wildcards in quotes, or - for a list on standard input"
        )
    return found


def below(pictures: Sequence[Path]) -> dict[Path, Path]:
    """The path of each picture below the innermost folder that all lie in."""
    absolute = {picture: Path(os.path.abspath(picture)) for picture in pictures}
    root = os.path.commonpath({path.parent for path in absolute.values()})
    return {picture: path.relative_to(root) for picture, path in absolute.items()}


def _standard_input() -> list[str]:
    data = sys.stdin.buffer.read()
    names = data.split(b"\0") if b"\0" in data else data.splitlines()
    return [os.fsdecode(name) for name in names if name.strip()]


def _named(name: str, wildcards: bool = False) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        pictures = [Path(found) for found in pictures_below(os.fspath(path))]
        if not pictures:
            if is_checkpoint(path):
                raise ValueError(f"the folder {name} holds a model, not pictures; the model comes first")
            raise ValueError(f"the folder {name} holds no pictures; known are {' '.join(PICTURES)}")
        return pictures
    if path.exists():  # a device or a pipe is read like a file
        return [path]
    if wildcards and glob.has_magic(name):
        matches = sorted(glob.glob(os.fspath(path), recursive=True), key=lambda m: [*map(natural_key, m.split(os.sep))])
        pictures = [Path(match) for match in matches if match.lower().endswith(PICTURES) and os.path.isfile(match)]
        if not pictures:
            matched = f"{len(matches)} files or folders, but no pictures" if matches else "nothing"
            raise ValueError(f"{name} matches {matched}; known pictures are {' '.join(PICTURES)}")
        return pictures
    raise FileNotFoundError(f"there is no file or folder {name}")
