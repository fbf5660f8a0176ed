"""What a data set is, and where its examples come from.

A source gives random access to ``{"image": bytes | uint8 [h, w, c], "label": ...}``. It has ``len``, ``[i]`` and
``name(i)``, what to call picture *i* in a message, and can be pickled, because worker processes read it too.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from res2net_jax.inference import imagenet_classes
from res2net_jax.picture_files import pictures_below


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One split of a classification set.

    Attributes:
        name: As asked for.
        split: The split that it is, e.g. ``test`` where ``validation`` was asked of a set without one;
            ``all`` for a folder that has no splits.
        held_out: The split that it gives for ``validation``.
        source: Random access: ``len(source)``; ``source[i]`` is ``{"image": encoded bytes or uint8 [h, w, c],
            "label": int}``, the label of a multi-label set being a tuple of ints, which may be empty;
            ``source.name(i)`` is what to call it in a message.
        num_classes: Labels are in ``range(num_classes)``.
        class_names: One a class, or None where they are ImageNet's 1000.
        class_subset: The classes among which a prediction is picked (ImageNet-A and -R), or None for all.
        multi_label: A prediction is right if it is any of the example's labels (ImageNet ReaL).
        in_chans: 3 (RGB) or 1 (grey).
        pieces: The examples that it takes of each file of a TFDS set, or of each class of a folder: the file (the
            class's folder), the first and the one after the last.
    """

    name: str
    split: str
    source: Any
    num_classes: int
    class_names: tuple[str, ...] | None = None
    class_subset: tuple[int, ...] | None = None
    multi_label: bool = False
    in_chans: int = 3
    pieces: tuple[tuple[str, int, int], ...] = ()
    held_out: str = "validation"

    def __len__(self) -> int:
        return len(self.source)

    @property
    def upright(self) -> bool:
        """Whether pictures are turned as their EXIF orientation says, as res2net_jax.classify does with photographs.

        Not those of ImageNet's classes: the published accuracies are of pictures as they are stored.
        """
        return self.class_names is not None


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


def resolve_split(title: str, split: str, available: Sequence[str]) -> str:
    """The member of ``available`` that ``split`` means; ValueError that lists them if there is none."""
    if split in available:
        return split
    other = {"validation": "test", "test": "validation"}.get(split)
    if other in available:
        return other
    raise ValueError(f"{title} has no split {split!r}; it has {', '.join(available) or 'none'}")


def held_out_of(available: Sequence[str]) -> str:
    """The member of ``available`` that ``validation`` means."""
    return "test" if "test" in available and "validation" not in available else "validation"


def imagenet_synsets() -> dict[str, int]:
    """WordNet id -> label, of ImageNet's 1000 classes."""
    return {synset: label for label, (synset, _) in enumerate(imagenet_classes())}


def some(names: Sequence[str], most: int = 5) -> str:
    """The first of ``names``, and how many more there are, for a message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
