"""What a checkpoint says of its model: which it is, whence, how its pictures are made, and whether it was certified."""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from res2net_jax.arch import Arch
from res2net_jax.files import first_line, require_local, versions
from res2net_jax.model import Res2Net
from res2net_jax.provenance import ancestor_of, with_ancestor
from res2net_jax.variants import Preprocessing

FORMAT = 1
FILE = "_CHECKPOINT_METADATA"  # Orbax's
OLD = ".old"  # what the name of a trainer's step ends in while it is saved again
NOT_CERTIFIED = {"certified": False, "reason": "saved from a live model, not ported from a release"}


def describe(model: Res2Net, *, source=None, certificate=None) -> dict[str, Any]:
    """The metadata of a checkpoint of ``model``, as JSON."""
    return {
        "format": FORMAT,
        "model": {
            "name": model.name,
            "arch": dataclasses.asdict(model.arch),
            "num_classes": model.num_classes,
            "in_chans": model.in_chans,
            "param_dtype": model.param_dtype.name,
            "class_names": None if model.class_names is None else list(model.class_names),
        },
        "preprocessing": None if model.preprocessing is None else dataclasses.asdict(model.preprocessing),
        "source": with_ancestor(source, model.derived_from),
        "certificate": certificate or NOT_CERTIFIED,
        "versions": versions("res2net_jax", "jax", "flax", "orbax-checkpoint", "numpy"),
    }


def abstract_model(metadata: dict[str, Any], *, dtype=None) -> Res2Net:
    """The model that :func:`describe` described, without its arrays; it computes in ``dtype``."""
    ancestor = ancestor_of(metadata)
    model = Res2Net(**_configuration(metadata), dtype=dtype)
    model.derived_from = ancestor.name if ancestor else None
    return model


def read_metadata(folder: str | os.PathLike) -> dict[str, Any]:
    """What :func:`describe` stored in ``folder``.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It is no checkpoint of a Res2Net, one of a later format, or damaged.
        OSError: It may not be read.
    """
    folder = locate(folder)
    metadata = stored_metadata(folder)
    require_format(metadata, folder)
    try:
        _configuration(metadata)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder} describes a model that this version of res2net_jax does not know, or it is damaged "
            f"({first_line(error)})"
        ) from error
    return metadata


def stored_metadata(folder: Path) -> dict[str, Any]:
    """As :func:`read_metadata`, of the checkpoint ``folder`` itself, of whatever format or version."""
    try:
        # From where Orbax keeps it: Orbax itself would look up the shape of every array too, which takes half a second.
        stored = json.loads((folder / FILE).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{folder} is no Orbax checkpoint, or it is damaged: {FILE} cannot be read ({first_line(error)})"
        ) from error
    metadata = stored.get("custom_metadata") if isinstance(stored, dict) else None
    parts = [metadata.get(part) for part in ("model", "source")] if isinstance(metadata, dict) else [None]
    if not all(isinstance(part, dict) for part in parts) or "format" not in metadata:
        raise ValueError(f"{folder} is an Orbax checkpoint, but not one of a Res2Net by res2net_jax; or it is damaged")
    return metadata


def require_format(metadata: dict[str, Any], folder: Path) -> None:
    """ValueError if what was stored in ``folder`` is of a format that this version does not read."""
    if metadata["format"] != FORMAT:
        raise ValueError(
            f"{folder} has checkpoint format {metadata['format']!r}; this version of res2net_jax reads format "
            f"{FORMAT}. Upgrade res2net_jax, or make the checkpoint again"
        )


def _configuration(metadata):
    """What :class:`Res2Net` takes."""
    config, setting = dict(metadata["model"]), metadata.get("preprocessing")
    config["arch"] = Arch(**config["arch"])
    return config | {"preprocessing": None if setting is None else Preprocessing(**setting)}


def locate(folder: str | os.PathLike) -> Path:
    """``folder`` if it is a checkpoint, else the newest numbered one in it, or in the ``checkpoints`` of a run."""
    require_local(folder)
    folder = Path(folder).expanduser().absolute()
    if is_checkpoint(folder):
        return folder
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    children = [*folder.iterdir(), *folder.glob("checkpoints/*")]
    steps = numbered(filter(is_checkpoint, children))
    if not steps and (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
        raise FileNotFoundError(f"{folder} is a run of python -m train.imagenet that has no checkpoint yet")
    if not steps:
        raise ValueError(
            f"{folder} is not a checkpoint; expected a folder written by res2net_jax.save, "
            "python -m porting, or python -m train.imagenet"
        )
    return steps[max(steps)]


def numbered(folders: Iterable[Path]) -> dict[int, Path]:
    """Those whose names are numbers, by these, the largest first.

    "5.old" stands for 5, while the trainer saves that again or if it was killed while doing so.
    """
    found = {folder.name.removesuffix(OLD): folder for folder in sorted(folders, reverse=True)}  # "5.old" before "5"
    return {int(name): found[name] for name in sorted(filter(str.isdecimal, found), key=int, reverse=True)}


def is_checkpoint(folder: Path) -> bool:
    return (folder / FILE).is_file()
