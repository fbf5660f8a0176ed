"""Data sets by name: what ``--dataset`` may be, and how each becomes a :class:`Dataset`."""

import difflib
import os
import re
from pathlib import Path

import numpy as np

from train.folders import open_folder
from train.imagenet_subsets import SUBSETS
from train.sources import Arrays, Dataset, Records, held_out_of, imagenet_synsets, resolve_split, some

# TFDS sets of several configurations: the one to take.
_CONFIGS = {"imagenet_v2": "imagenet_v2/matched-frequency"}


def open_dataset(name: str, split: str, *, data_dir: str | os.PathLike | None = None) -> Dataset:
    """One split of the set called ``name``.

    Args:
        name: ``digits``; ``folder:DIR``; else a TFDS set, ``name[/config][:version]``.
        split: ``train``, ``validation`` or ``test``. A set that calls its held-out examples ``test`` gives
            them for ``validation`` too, and the other way round. Slices such as ``train[:90%]`` work; of
            a folder they are in per cent, and of each class.
        data_dir: Where TFDS sets were prepared; by default ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.

    Raises:
        FileNotFoundError: There is no such folder, or no such prepared set.
        ValueError: No such split, nothing in it, or not a classification set of pictures.
    """
    if name == "digits":
        return _digits(split)
    if name.startswith("folder:"):
        return open_folder(name, split)
    return _tfds(name, split, data_dir)


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
            f"{folder} lacks {len(missing)} of the files of split {split}: {some(missing)}. "
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
        class_subset=SUBSETS.get(name.partition("/")[0].partition(":")[0]),
        multi_label=multi_label,
        in_chans=in_chans,
        pieces=tuple((p.filename, p.skip, p.skip + p.take) for p in info.splits[split].file_instructions),
        held_out=held_out_of(info.splits),
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
        f"no prepared data set {name!r} in {data_dir}, which holds {some(prepared) or 'none'}. "
        + (f"Did you mean {near[0]}? " if near else "")
        + f"To prepare it: {_prepare(name, data_dir)}"
    )


def _prepare(name, data_dir):
    manual = " --manual-dir FOLDER_OF_THE_TARS" if name.startswith("imagenet2012") else ""
    dataset = "" if name == "imagenet2012" else f" --dataset {_CONFIGS.get(name, name)}"
    return f"python -m train.prepare{dataset}{manual} --data-dir {data_dir or '~/tensorflow_datasets'}"
