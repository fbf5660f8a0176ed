"""Data sets by name: what ``--dataset`` may be, and how each becomes a :class:`Dataset`."""

import dataclasses
import difflib
import importlib.resources
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from res2net_jax.picture_files import PICTURES, natural_key
from train import imagenet_subsets
from train.sources import Arrays, Files, Records, list_pictures

# TFDS sets that need a word of their own: the configuration to take, or the classes to score among.
_CONFIGS = {"imagenet_v2": "imagenet_v2/matched-frequency"}
_SUBSETS = {"imagenet_a": imagenet_subsets.IMAGENET_A, "imagenet_r": imagenet_subsets.IMAGENET_R}


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
        pieces: Of a TFDS set the examples that it takes of each file: the file, the first and the one after the last.
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


def open_dataset(name: str, split: str, *, data_dir: str | os.PathLike | None = None) -> Dataset:
    """One split of the set called ``name``.

    Args:
        name: ``digits``; ``folder:DIR``; else a TFDS set, ``name[/config][:version]``.
        split: ``train``, ``validation`` or ``test``. A set that calls its held-out examples ``test`` gives
            them for ``validation`` too, and the other way round. TFDS slices such as ``train[:90%]`` work.
        data_dir: Where TFDS sets were prepared; by default ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.

    Raises:
        FileNotFoundError: There is no such folder, or no such prepared set.
        ValueError: No such split, nothing in it, or not a classification set of pictures.
    """
    if name == "digits":
        return _digits(split)
    if name.startswith("folder:"):
        return _folder(name, split)
    return _tfds(name, split, data_dir)


def resolve_split(title: str, split: str, available: Sequence[str]) -> str:
    """The member of ``available`` that ``split`` means; ValueError that lists them if there is none."""
    if split in available:
        return split
    other = {"validation": "test", "test": "validation"}.get(split)
    if other in available:
        return other
    raise ValueError(f"{title} has no split {split!r}; it has {', '.join(available) or 'none'}")


def _held_out(available):
    return "test" if "test" in available and "validation" not in available else "validation"


def _digits(split):
    """scikit-learn's handwritten digits: 1797 grey 8x8 pictures, 0..16 stretched to 0..255.

    They come without a split. Every fifth picture of each class is for testing: 1442 and 355 pictures.
    """
    from sklearn.datasets import load_digits

    split = resolve_split("digits", split, ("train", "test"))
    data = load_digits()
    occurrence = np.zeros(len(data.target), int)
    for digit in range(10):
        occurrence[data.target == digit] = np.arange(np.sum(data.target == digit))
    chosen = (occurrence % 5 == 4) == (split == "test")
    images = np.round(data.images[chosen, :, :, None] * (255 / 16)).astype(np.uint8)
    source = Arrays(f"digits[{split}]", images, data.target[chosen].astype(np.int32))
    return Dataset("digits", split, source, 10, class_names=tuple("0123456789"), in_chans=1, held_out="test")


def _folder(name, split):
    """One sub-folder per class, or ``train`` and ``val`` (``valid``, ``validation``, ``test``) of such sub-folders."""
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
        held_out = _held_out(splits)
        classes = _classes(root / splits["train"]) if "train" in splits else None
        root = root / splits[split]
    else:
        split = held_out = "all"
        classes = None
    here = _classes(root)
    classes = classes or here
    if unknown := [label for label in here if label not in classes]:
        raise ValueError(f"{root} has classes that the training folder has not: {_some(unknown)}")
    labels, num_classes, class_names = _labels(classes)
    files = {label: list_pictures(root / label) for label in here}
    if not any(files.values()):
        raise ValueError(f"{root} holds no pictures in its sub-folders; known are {' '.join(PICTURES)}")
    if empty := [label for label, pictures in files.items() if not pictures]:
        raise ValueError(f"{root} has classes without a picture: {_some(empty)}. Fill or remove these folders")
    if num_classes == 1:
        raise ValueError(f"{root} has one class, {classes[0]}; expected one sub-folder for each of several classes")
    paths = [os.fsencode(os.path.join(label, file)) for label in here for file in files[label]]
    source = Files(
        str(root.absolute()),
        np.array(paths),
        np.repeat([labels[label] for label in here], [len(files[label]) for label in here]).astype(np.int32),
    )
    subset = next((s for s in _SUBSETS.values() if class_names is None and set(labels.values()) == set(s)), None)
    return Dataset(name, split, source, num_classes, class_names, class_subset=subset, held_out=held_out)


def _classes(root):
    names = [child.name for child in root.iterdir() if child.is_dir() and not child.name.startswith(".")]
    if not names:
        raise ValueError(f"{root} has no sub-folders; expected one for each class, with its pictures inside")
    if broken := [name for name in names if name.encode(errors="ignore").decode() != name]:
        raise ValueError(f"{root} has folders whose names are not UTF-8: {_some([*map(ascii, broken)])}. Rename them")
    return sorted(names, key=natural_key)  # timm's order


def _labels(classes):
    """Folder name -> label, the number of classes, and the class names (None for ImageNet's)."""
    synsets = imagenet_synsets()
    if all(name in synsets for name in classes):
        return {name: synsets[name] for name in classes}, len(synsets), None
    if all(map(str.isdecimal, classes)) and len(classes) == len(synsets) and int(classes[-1]) == len(synsets) - 1:
        return {name: int(name) for name in classes}, len(synsets), None
    return {name: label for label, name in enumerate(classes)}, len(classes), tuple(classes)


def imagenet_synsets() -> dict[str, int]:
    """WordNet id -> label, of ImageNet's 1000 classes."""
    table = importlib.resources.files("res2net_jax").joinpath("imagenet_classes.tsv").read_text("utf-8")
    return {line.split("\t")[0]: label for label, line in enumerate(table.splitlines())}


def _some(names, most=5):
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _tfds(name, split, data_dir):
    import tensorflow_datasets as tfds

    folder = prepared_folder(name, data_dir)
    builder = tfds.builder_from_directory(folder)
    info = builder.info
    base, bracket, rest = split.partition("[")
    try:
        split = resolve_split(f"{name} in {folder}", base, tuple(info.splits)) + bracket + rest
    except ValueError as error:
        if name.partition(":")[0] != "imagenet2012" or base not in ("train", "validation"):
            raise
        raise ValueError(
            f"{error}: its tar was not there. Move or remove {folder} and prepare it again: {_prepare(name, data_dir)}"
        ) from error
    image_key, label_key = _keys(name, info.features)
    image, label = info.features[image_key], info.features[label_key]
    in_chans = image.shape[-1] or 3
    if in_chans not in (1, 3) or image.np_dtype != np.uint8:
        raise ValueError(
            f"{name} has pictures of {in_chans} channels and {image.np_dtype.__name__}; need 1 or 3, uint8"
        )
    multi_label = isinstance(label, tfds.features.Sequence)
    names = (label.feature if multi_label else label).names
    present = {path.name for path in folder.iterdir()}
    if missing := [path.name for path in info.splits[split.partition("[")[0]].filepaths if path.name not in present]:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of the files of split {split}: {_some(missing)}. "
            f"Copy them, or remove the folder and prepare it again: {_prepare(name, data_dir)}"
        )
    try:
        records = builder.as_data_source(split, decoders={image_key: tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        raise ValueError(
            f"{folder} was prepared as {info.file_format.value}, which has no random access. Move or remove it, or "
            f"give another --data-dir, then prepare it as array_record: {_prepare(name, data_dir)}"
        ) from error
    if not len(records):
        raise ValueError(f"{name} has no examples in split {split}")
    imagenet = names == list(imagenet_synsets())
    return Dataset(
        name,
        split,
        Records(f"{name}[{split}]", records, image_key, label_key),
        len(names),
        class_names=None if imagenet else tuple(names),
        class_subset=_SUBSETS.get(name.partition("/")[0].partition(":")[0]),
        multi_label=multi_label,
        in_chans=in_chans,
        pieces=tuple((p.filename, p.skip, p.skip + p.take) for p in info.splits[split].file_instructions),
        held_out=_held_out(info.splits),
    )


def _keys(name, features):
    """The picture and its label among a TFDS set's features."""
    import tensorflow_datasets as tfds

    def is_label(feature):
        feature = feature.feature if isinstance(feature, tfds.features.Sequence) else feature
        return isinstance(feature, tfds.features.ClassLabel)

    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    labels = [key for key, feature in features.items() if is_label(feature)]
    # ReaL keeps the first label beside its own; other sets with several call the usual one "label".
    label = next((key for key in ("real_label", "label") if key in labels), labels[0] if len(labels) == 1 else None)
    if len(images) != 1 or label is None:
        raise ValueError(
            f"{name} is not a set of pictures with one class label; its features are {', '.join(map(str, features))}"
        )
    return images[0], label


def prepared_folder(name: str, data_dir: str | os.PathLike | None) -> os.PathLike:
    """``data_dir/name[/config]/version``, the highest version unless one is asked for."""
    import tensorflow_datasets as tfds
    from etils import epath

    data_dir = epath.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    path, _, version = name.partition(":")
    root = data_dir / _CONFIGS.get(path, path)
    if not re.fullmatch(r"\w+(/[\w.-]+)?", path):
        hint = f"did you mean folder:{name}?" if Path(name).is_dir() else "expected digits, folder:DIR or a TFDS name"
        raise ValueError(f"{name!r} is not the name of a data set; {hint}")
    found = _versions(root)
    if not found and "/" not in path and root.is_dir():
        configs = [child.name for child in root.iterdir() if child.is_dir() and _versions(child)]
        if len(configs) > 1:
            raise ValueError(f"{name} has several configurations in {data_dir}: ask for {name}/{' or '.join(configs)}")
        found = _versions(root / configs[0]) if configs else {}
    if version and version not in found or not found:
        raise FileNotFoundError(_not_prepared(name, data_dir, root, found))
    return found[version] if version else found[max(found, key=tfds.core.Version)]


def _versions(root):
    if not root.is_dir():
        return {}
    return {
        child.name: child for child in root.iterdir() if (child / "dataset_info.json").exists() and _is_version(child)
    }


def _is_version(folder):
    return re.fullmatch(r"\d+\.\d+\.\d+", folder.name) is not None


def _not_prepared(name, data_dir, root, found):
    if found:
        return f"{name}: {root} has version {', '.join(sorted(found))}, not the one asked for"
    halves = [child.name for child in root.iterdir() if "incomplete" in child.name] if root.is_dir() else []
    if halves:
        return (
            f"{name} is half prepared: {root / halves[0]} is what an interrupted preparation left. "
            f"Remove it and prepare again: {_prepare(name, data_dir)}"
        )
    children = data_dir.iterdir() if data_dir.is_dir() else ()
    prepared = sorted(child.name for child in children if child.is_dir() and child.name != "downloads")
    near = difflib.get_close_matches(name, ["digits", *prepared], n=1, cutoff=0.85)
    near = [f"folder:{name}"] if Path(name).is_dir() else near
    return (
        f"no prepared data set {name!r} in {data_dir}, which holds {_some(prepared) or 'none'}. "
        + (f"Did you mean {near[0]}? " if near else "")
        + f"To prepare it: {_prepare(name, data_dir)}"
    )


def _prepare(name, data_dir):
    manual = " --manual-dir FOLDER_OF_THE_TARS" if name.startswith("imagenet2012") else ""
    dataset = "" if name == "imagenet2012" else f" --dataset {_CONFIGS.get(name, name)}"
    return f"python -m train.prepare{dataset}{manual} --data-dir {data_dir or '~/tensorflow_datasets'}"
