"""Where examples come from: random-access sources of ``{"image": bytes | uint8 [h, w, c], "label": ...}``.

Every source has ``len``, ``[i]`` and ``name(i)``, what to call picture *i* in a message. All can be
pickled, because worker processes read them too.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from res2net_jax.picture_files import pictures_below


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Pictures in memory: ``images`` uint8 [n, h, w, c], ``labels`` int [n]."""

    title: str
    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"image": self.images[i], "label": int(self.labels[i])}

    def name(self, i: int) -> str:
        return f"picture {i} of {self.title}"


@dataclasses.dataclass(frozen=True)
class Files:
    """Picture files below ``root``.

    ``paths`` is an array of encoded relative paths: a million Python strings would be copied
    into every worker process one by one.
    """

    root: str
    paths: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        with open(self.name(i), "rb") as file:
            return {"image": file.read(), "label": int(self.labels[i])}

    def name(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(bytes(self.paths[i])))


@dataclasses.dataclass(frozen=True)
class Records:
    """A TFDS data source whose pictures are left encoded.

    ``label_key`` may be a sequence feature; its label is then a tuple of ints.
    """

    title: str
    records: Any
    image_key: str
    label_key: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict[str, Any]:
        try:
            record = self.records[i]
        except RuntimeError as error:  # of a damaged file, which may also give empty records
            raise OSError(f"the record is damaged: {error}") from error
        image, label = record[self.image_key], record[self.label_key]
        if image is None or label is None:
            raise OSError("the record is damaged: it is empty")
        label = np.asarray(label)
        return {
            "image": image,
            "label": tuple(label.astype(int).tolist()) if label.ndim else int(label),
        }

    def name(self, i: int) -> str:
        try:
            file = self.records[i].get("file_name")
        except RuntimeError:
            file = None
        return f"record {i} of {self.title}" + (f" ({file.decode(errors='replace')})" if file else "")


def list_pictures(folder: Path) -> list[str]:
    """Paths of the pictures below ``folder``, relative to it, sorted; hidden files are skipped."""
    return sorted(os.path.relpath(picture, folder) for picture in pictures_below(os.fspath(folder)))
