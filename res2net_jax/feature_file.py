"""A large ``.npy`` or ``.npz`` that is written batch by batch, and continues after a kill where it stopped.

Until it is whole, everything is in a hidden folder beside it::

    rows.npy         the rows so far, under the header of the whole array
    progress.jsonl   what is computed; then, one line per batch, whose rows are on the disk
    whole            all of it, about to get its name
"""

import errno
import hashlib
import json
import math
import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from res2net_jax import files

SUFFIXES = (".npy", ".npz")
_CHUNK = 1 << 24  # bytes copied at a time
_NAMES = 4096  # file names written at a time


def check_target(target: Path, overwrite: bool = False) -> None:
    """Raises what :class:`FeatureFile` raises for ``target``'s name, or because it exists, before any work is done."""
    if target.suffix not in SUFFIXES:
        raise ValueError(f"features go to a file in {' or '.join(SUFFIXES)}; got {target}")
    if not _folder(target).exists():
        _check_new(target, overwrite)


def stamp(name: str) -> list[int] | None:
    """Size and time of change of a picture, which another one of its name does not have; None if it is not there."""
    try:
        status = os.stat(os.path.expanduser(name))
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


class FeatureFile:
    """Rows of float32 on their way to ``target``.

    Attributes:
        rows: How many are there already.
        unreadable: The pictures among them that could not be read, by row: why.
        again: Those of them that an earlier run could not read, to be tried and written once more.
        finished: The file has got its name.

    Args:
        target: Ends in ``.npy`` (with the names of the pictures in a ``.json`` beside it) or ``.npz`` (arrays
            ``features`` and ``files``).
        names: Of the pictures, one per row.
        shape: Of a row.
        settings: What the rows depend on, as JSON. Rows that were made with others are not continued.
        overwrite: Replace ``target``, and start anew instead of refusing rows of other settings.

    Raises:
        FileExistsError: ``target`` is there.
        ValueError: It was begun with other settings or pictures.
        OSError: No permission, or no space for all of it.
    """

    def __init__(
        self, target: Path, names: Sequence[str], shape: tuple[int, ...], settings: dict[str, Any], *, overwrite: bool
    ):
        self.target, self.names, self.shape, self.settings = target, names, shape, settings
        self.folder = _folder(target)
        self._rows = self.folder / "rows.npy"
        self.row_bytes = 4 * math.prod(shape)
        self.rows, self.unreadable, self.again, self.finished = 0, {}, [], False
        with files.writing(target):
            progress = self._read_progress(overwrite)
            if not progress or overwrite and self._killed_at_the_end():
                self._begin(overwrite)
            elif self._killed_at_the_end():
                self.finished = True
                shutil.rmtree(self.folder)
            else:
                self._go_on()

    def write(self, rows: np.ndarray, pictures: dict[int, list[int] | None | str]) -> None:
        """Writes a batch, and records it once it is on the disk.

        Args:
            rows: The next ones, or some of :attr:`again`; NaN where a picture cannot be read.
            pictures: For each its number, and the picture's :func:`stamp` from before it was read, or why it cannot be.
        """
        try:
            with open(self._rows, "r+b") as file:
                for number, row in zip(pictures, rows, strict=True):
                    file.seek(self._start + number * self.row_bytes)
                    file.write(np.ascontiguousarray(row, "<f4").data)
                file.flush()
                os.fsync(file.fileno())
            self._record({"pictures": pictures})
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise
            raise OSError(
                errno.ENOSPC,
                f"no space for {self.target}; {self.rows} of its {len(self.names)} rows are kept in {self.folder}: "
                "make some space and give the same command again",
            ) from error
        self._count(pictures)

    def finish(self) -> None:
        """Gives the file its name, now that all rows are there."""
        with files.writing(self.target):
            whole = self.folder / "whole"
            if not whole.exists():
                if self.target.suffix == ".npy":
                    os.rename(self._rows, whole)
                else:
                    self._write_npz(self.folder / "npz")
                    os.rename(self.folder / "npz", whole)
            if self.target.suffix == ".npy":
                self._write_names(self.target.with_suffix(".json"))
            self._rows.unlink(missing_ok=True)
            os.replace(whole, self.target)
            shutil.rmtree(self.folder)
        self.finished = True

    def discard(self) -> None:
        """Forgets the rows."""
        # First what says how far they came: with that alone beside it, an old target would be taken for finished.
        (self.folder / "progress.jsonl").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read_progress(self, overwrite) -> bool:
        """Whether there is an unfinished run to go on with; if so, how far it came."""
        path = self.folder / "progress.jsonl"
        if not path.exists():
            return False
        lines = path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):  # torn by a kill
            os.truncate(path, path.stat().st_size - len(lines.pop()))
        if not lines:
            return False
        wanted, (found, *batches) = self._described(), map(json.loads, lines)
        changed = [key for key in wanted | found if wanted.get(key) != found.get(key)]
        if not changed:
            batches = [{int(number): state for number, state in batch["pictures"].items()} for batch in batches]
            changed = self._replaced(batches)
        if not changed:
            for batch in batches:
                self._count(batch)
            return True
        if overwrite:
            return False
        raise ValueError(
            f"{self.target} was begun with other settings ({', '.join(changed)}), in {self.folder}; give the same ones "
            "to go on, or --force (overwrite=True) to start anew"
        )

    def _count(self, pictures):
        for number, state in pictures.items():
            if isinstance(state, str):
                self.unreadable[number] = state
            else:
                self.unreadable.pop(number, None)
        self.rows = max([self.rows, *(number + 1 for number in pictures)])

    def _replaced(self, batches):
        """The first picture that is another since it was read, as what has changed."""
        for batch in batches:
            for number, state in batch.items():
                if not isinstance(state, str) and state != stamp(self.names[number]):
                    return [f"files: {self.names[number]} has changed since"]
        return []

    def _killed_at_the_end(self):
        """After the file had got its name."""
        left = self._rows.exists() or (self.folder / "whole").exists()
        return self.target.exists() and self.folder.exists() and not left

    def _begin(self, overwrite):
        self.discard()
        _check_new(self.target, overwrite)
        self.folder.mkdir(parents=True)
        with open(self._rows, "wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(self.names), *self.shape)}
            np.lib.format.write_array_header_1_0(file, header)
            self._start = file.tell()
        self._require_space()
        self._record(self._described())

    def _go_on(self):
        if (self.folder / "whole").exists():
            return
        self.again = list(self.unreadable)
        with open(self._rows, "r+b") as file:  # rows that were written and not yet recorded are written again
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            self._start = file.tell()
            file.truncate(self._start + self.rows * self.row_bytes)
        self._require_space()

    def _described(self):
        paths = hashlib.sha256()  # absolute ones: the same names in another folder are other pictures
        for name in self.names:
            paths.update(os.fsencode(os.path.abspath(os.path.expanduser(name))) + b"\0")
        return self.settings | {"files": f"{len(self.names)} paths, {paths.hexdigest()}", "shape": list(self.shape)}

    def _record(self, line):
        with open(self.folder / "progress.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _require_space(self):
        need = (len(self.names) - self.rows) * self.row_bytes
        need += len(self.names) * self.row_bytes if self.target.suffix == ".npz" else 0
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise OSError(
                errno.ENOSPC, f"{self.target} needs {need / 1e9:,.1f} GB to be written; {free / 1e9:,.1f} GB are free"
            )

    def _write_names(self, file):
        described = self.settings | {"unreadable": self.unreadable, "files": list(self.names)}
        with files.replacing(file, overwrite=True) as temporary:
            temporary.write_text(json.dumps(described, indent=1) + "\n", "utf-8")

    def _write_npz(self, file):
        """What numpy.savez writes, in pieces, and with a fixed date so that the same content is the same bytes."""
        with zipfile.ZipFile(file, "w") as archive:
            features, names = zipfile.ZipInfo("features.npy"), zipfile.ZipInfo("files.npy")
            names.compress_type = zipfile.ZIP_DEFLATED  # fixed width: mostly zeros
            with open(self._rows, "rb") as rows, archive.open(features, "w", force_zip64=True) as out:
                shutil.copyfileobj(rows, out, _CHUNK)
            with archive.open(names, "w", force_zip64=True) as out:
                dtype = np.dtype(f"<U{max(map(len, self.names))}")
                header = {"descr": dtype.str, "fortran_order": False, "shape": (len(self.names),)}
                np.lib.format.write_array_header_1_0(out, header)
                for start in range(0, len(self.names), _NAMES):
                    out.write(np.array(self.names[start : start + _NAMES], dtype).tobytes())


def _folder(target):
    return target.parent / f".{target.name}.part"


def _check_new(target, overwrite):
    for file in (target, target.with_suffix(".json")) if target.suffix == ".npy" else (target,):
        files.check_new(file, overwrite)
