"""Pictures in folders as a data set: ``--dataset folder:DIR``."""

import os
import re
from pathlib import Path

import numpy as np

from res2net_jax.picture_files import PICTURES, natural_key
from train.imagenet_subsets import SUBSETS
from train.sources import Dataset, Files, held_out_of, imagenet_synsets, list_pictures, resolve_split, some


def open_folder(name: str, split: str) -> Dataset:
    """One sub-folder per class, or ``train`` and ``val`` (``valid``, ``validation``, ``test``) of such sub-folders.

    Args:
        name: ``folder:DIR``.
        split: One of these, or any name if there are none; or a part of each of its classes, as ``train[:80%]``.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: No such split, or a folder that does not look so.
    """
    split, first, last = _sliced(split)
    root = Path(name.removeprefix("folder:")).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"--dataset {name}: there is no folder {root.absolute()}")
    found = {child.name for child in root.iterdir() if child.is_dir() and not child.name.startswith(".")}
    held_out = next((name for name in ("val", "valid") if name in found), "validation")
    splits = {"train": "train", "validation": held_out, "test": "test"}
    splits = {key: folder for key, folder in splits.items() if folder in found}
    # "train" alone may be a class, beside "bus" and "tram".
    if len(splits) > 1 or found and found == set(splits.values()):
        split = "validation" if split in ("val", "valid") else split  # as the folder may be called
        split = resolve_split(str(root), split, tuple(splits))
        held_out = held_out_of(splits)
        classes = _classes(root / splits["train"]) if "train" in splits else None
        root = root / splits[split]
    else:
        split = held_out = "all"
        classes = None
    here = _classes(root)
    classes = classes or here
    if unknown := [label for label in here if label not in classes]:
        raise ValueError(f"{root} has classes that the training folder lacks: {some(unknown)}")
    labels, num_classes, class_names = _labels(classes)
    files = {label: list_pictures(root / label) for label in here}
    pieces = tuple(
        (str(root / label), *(round(len(files[label]) * at / 100) for at in (first, last))) for label in here
    )
    files = {label: files[label][start:end] for label, (_, start, end) in zip(here, pieces)}
    if (first, last) != (0, 100):
        split += f"[{first}%:{last}%]"
    if not any(files.values()):
        raise ValueError(f"{root} holds no pictures in its sub-folders; known are {' '.join(PICTURES)}")
    if empty := [label for label, pictures in files.items() if not pictures]:
        where = f"{root} has classes without a picture" + (f" in {split}" if "[" in split else "")
        raise ValueError(f"{where}: {some(empty)}. Fill or remove these folders")
    if num_classes == 1:
        raise ValueError(f"{root} has one class, {classes[0]}; expected one sub-folder for each of several classes")
    paths = [os.fsencode(os.path.join(label, file)) for label in here for file in files[label]]
    source = Files(
        str(root.absolute()),
        np.array(paths),
        np.repeat([labels[label] for label in here], [len(files[label]) for label in here]).astype(np.int32),
    )
    subset = next((s for s in SUBSETS.values() if class_names is None and set(labels.values()) == set(s)), None)
    return Dataset(name, split, source, num_classes, class_names, class_subset=subset, pieces=pieces, held_out=held_out)


def _sliced(split):
    """``train[:80%]`` -> ``train``, 0, 80."""
    match = re.fullmatch(r"([^\[\]]*)(?:\[(?:(\d+)%)?:(?:(\d+)%)?\])?", split)
    first, last = (int(match[2] or 0), int(match[3] or 100)) if match else (0, 0)
    if not 0 <= first < last <= 100:
        raise ValueError(f"a part of a folder's classes is in per cent, as train[:80%] or train[80%:]; got {split!r}")
    return match[1], first, last


def _classes(root):
    names = [child.name for child in root.iterdir() if child.is_dir() and not child.name.startswith(".")]
    if not names:
        raise ValueError(f"{root} has no sub-folders; expected one for each class, with its pictures inside")
    if broken := [name for name in names if name.encode(errors="ignore").decode() != name]:
        raise ValueError(f"{root} has folders whose names are not UTF-8: {some([*map(ascii, broken)])}. Rename them")
    return sorted(names, key=natural_key)  # timm's order


def _labels(classes):
    """Folder name -> label, the number of classes, and the class names (None for ImageNet's)."""
    synsets = imagenet_synsets()
    if all(name in synsets for name in classes):
        return {name: synsets[name] for name in classes}, len(synsets), None
    if all(map(str.isdecimal, classes)) and len(classes) == len(synsets) and int(classes[-1]) == len(synsets) - 1:
        return {name: int(name) for name in classes}, len(synsets), None
    return {name: label for label, name in enumerate(classes)}, len(classes), tuple(classes)
