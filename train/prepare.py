"""Builds a TFDS data set, once: python -m train.prepare --manual-dir TARS --data-dir DATA

ImageNet's own files, ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, are in the folder of --manual-dir;
they come from https://image-net.org/download-images after registration. Other sets are downloaded. The result
is ArrayRecord files in the folder of --data-dir. Needs TensorFlow (the extra "prepare"); reading them does not.
"""

import dataclasses
import os
import shutil
import tarfile
from pathlib import Path

import tyro

from res2net_jax import command_line
from train.datasets import open_dataset, prepared_folder

TARS = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
COMPLETE = {"train": 1_281_167, "validation": 50_000}

# Sets that are built from ImageNet's tars, with the splits that they take from them.
_FROM_TARS = {"imagenet2012": ("train", "validation"), "imagenet2012_real": ("validation",)}


@dataclasses.dataclass(frozen=True)
class Options:
    """Build a TFDS data set as ArrayRecord files."""

    data_dir: str
    """Folder for the data sets; give the same to the other commands, or set TFDS_DATA_DIR to it."""
    manual_dir: str | None = None
    """Folder with ImageNet's tars."""
    dataset: str = "imagenet2012"
    """imagenet2012, imagenet2012_real, imagenet_v2/matched-frequency, imagenet_a, or any other TFDS set."""


def prepare(dataset: str, *, data_dir: str, manual_dir: str | None = None) -> dict[str, int]:
    """Builds ``dataset`` in ``data_dir`` unless it is there already.

    Returns:
        The number of examples of each split.

    Raises:
        ImportError: TensorFlow is not installed.
        FileNotFoundError: A tar is not where it should be.
        ValueError: No such TFDS set, or a tar that is none, or broken; or the set is there without a split whose tar
            is there, or in another format.
        OSError: Not enough space.
    """
    tars = _find_tars(dataset, manual_dir)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import tensorflow  # noqa: F401  TFDS asks for it halfway through, with a longer message
    except ImportError as error:
        raise ImportError("preparing a data set needs TensorFlow: pip install 'res2net_jax[prepare]'") from error
    import tensorflow_datasets as tfds

    data_dir = str(Path(data_dir).expanduser())
    try:
        builder = tfds.builder(dataset, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(
            f"TFDS knows no data set {dataset!r}; see https://www.tensorflow.org/datasets/catalog"
        ) from error
    except ValueError as error:
        if "File format" not in str(error):
            raise
        folder = prepared_folder(dataset, data_dir)
        raise ValueError(
            f"{folder} was prepared in another format than array_record. Move or remove it, or give another "
            "--data-dir, then run this again"
        ) from error
    if builder.is_prepared():
        if missing := [TARS[split] for split in TARS if _is_missing(split, builder, tars)]:
            raise ValueError(
                f"{builder.data_path} was prepared without {' and '.join(missing)}. Move or remove it, then run this "
                "again"
            )
        print(f"Already there: {builder.data_path}")
    else:
        _require_space(data_dir, sum(tar.stat().st_size for tar in tars))
        config = tfds.download.DownloadConfig(manual_dir=manual_dir and str(Path(manual_dir).expanduser()))
        try:
            builder.download_and_prepare(download_config=config)
        except tarfile.TarError as error:
            raise ValueError(f"a tar of {manual_dir} is broken: {error}. Nothing was prepared") from error
    for leftover in builder.data_path.parent.glob("*incomplete*"):
        print(f"{leftover} is what an interrupted preparation left; it can be removed.")
    return {split: info.num_examples for split, info in builder.info.splits.items()}


def _find_tars(dataset, manual_dir):
    name = dataset.partition("/")[0].partition(":")[0]
    if name not in _FROM_TARS:
        return []
    wanted = [TARS[split] for split in _FROM_TARS[name]]
    if manual_dir is None:
        raise ValueError(f"{name} is built from {' and '.join(wanted)}; say where they are with --manual-dir")
    folder = Path(manual_dir).expanduser()
    tars = [folder / tar for tar in wanted if (folder / tar).exists()]
    if not tars:
        raise FileNotFoundError(
            f"there is no {' or '.join(wanted)} in {folder.absolute()}; they come from "
            "https://image-net.org/download-images after registration, and stay packed"
        )
    for tar in tars:
        if not tarfile.is_tarfile(tar):
            raise ValueError(f"{tar} is not a tar file; was the download complete?")
    for tar in wanted:
        if folder / tar not in tars:
            print(f"There is no {tar} in {folder}: the split it holds will be missing.")
    return tars


def _is_missing(split, builder, tars):
    return split not in builder.info.splits and TARS[split] in [tar.name for tar in tars]


def _require_space(data_dir, size):
    folder = Path(data_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < 1.02 * size:
        raise OSError(f"{folder} has {free / 1e9:.1f} GB free; the data set needs {1.02 * size / 1e9:.1f} GB")


def run(arguments: list[str]) -> None:
    """The command."""
    options = tyro.cli(Options, args=arguments, prog="python -m train.prepare", description=__doc__)
    counts = prepare(options.dataset, data_dir=options.data_dir, manual_dir=options.manual_dir)
    for split, count in counts.items():
        # Reads it as the trainer will, so that what is wrong shows now.
        found = len(open_dataset(options.dataset, split, data_dir=options.data_dir)) if count else 0
        note = ""
        if options.dataset == "imagenet2012" and count != COMPLETE.get(split, count):
            note = f" (the complete ImageNet has {COMPLETE[split]:,})"
        print(f"{options.dataset} {split}: {found:,} pictures{note}")


if __name__ == "__main__":
    command_line.main(run)
