"""A model on disk: an Orbax checkpoint that says which model it holds, whence, and whether it was certified.

The arrays are the item ``model``, a flat dict under the paths of :func:`res2net_jax.init.variables`;
everything else is the checkpoint's custom metadata, plain JSON. Neither depends on a Flax version.
A trainer may store more items beside ``model``, and a folder of numbered steps is read as its newest one.
"""

import dataclasses
import errno
import importlib.metadata
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

from res2net_jax.arch import Arch, override
from res2net_jax.init import variables
from res2net_jax.model import Res2Net

FORMAT = 1
NOT_CERTIFIED = {"certified": False, "reason": "saved from a live model, not ported from a release"}


def save(
    model: Res2Net,
    folder: str | os.PathLike,
    *,
    overwrite: bool = False,
    source: dict[str, Any] | None = None,
    certificate: dict[str, Any] | None = None,
) -> Path:
    """Saves ``model`` as an Orbax checkpoint that :func:`res2net_jax.load` gives back.

    The folder appears whole or not at all: arrays go to a temporary folder beside it, then it is renamed.

    Args:
        model: The model; parameters keep their dtype.
        folder: Where to. Its parent is made if need be.
        overwrite: Replaces a checkpoint that is already there.
        source: Where the weights are from, as JSON.
        certificate: What :func:`porting.parity.certify` said of them.

    Raises:
        FileExistsError: ``folder`` exists, and ``overwrite`` is False or it is no checkpoint.
        OSError: No permission or no space; nothing is left behind.
    """
    from orbax.checkpoint import v1 as ocp

    folder = Path(folder).absolute()
    if folder.exists() and not (overwrite and is_checkpoint(folder)):
        reason = "it is not a checkpoint, so it is left alone" if overwrite else "pass overwrite=True to replace it"
        raise FileExistsError(f"{folder} exists; {reason}")
    try:
        with lock(folder):
            remove_leftovers(folder)
            temporary = Path(tempfile.mkdtemp(prefix=_leftover_prefix(folder), dir=folder.parent))
            try:
                metadata = describe(model, source=source, certificate=certificate)
                ocp.save_checkpointables(temporary / "new", {"model": arrays(model)}, custom_metadata=metadata)
                if folder.exists():
                    os.rename(folder, temporary / "old")
                os.rename(temporary / "new", folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except Exception as error:
        raise explain_write(error, folder) from error
    return folder


def load(folder: str | os.PathLike, **options) -> Res2Net:
    """The model in ``folder``, in eval mode. Options as in :func:`res2net_jax.load`."""
    folder = locate(folder)
    return restore(folder, read_metadata(folder), **options)


def restore(
    folder: Path,
    metadata: dict[str, Any],
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    dtype=None,
    param_dtype=None,
    sharding: jax.sharding.Sharding | None = None,
    arch: dict[str, Any] | None = None,
    seed: int = 0,
) -> Res2Net:
    """Reads the arrays straight to their devices and fits them to the model that is asked for."""
    from orbax.checkpoint import v1 as ocp

    from res2net_jax.adapt import adapt

    saved = abstract_model(metadata, dtype=dtype, param_dtype=param_dtype)
    place = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    leaves = variables(saved)
    target = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place) for path, leaf in leaves.items()}
    try:
        loaded = ocp.load_checkpointables(folder, {"model": target})["model"]
    except Exception as error:
        raise ValueError(f"the checkpoint {folder} is damaged and cannot be read: {_first_line(error)}") from error
    for path, leaf in leaves.items():
        leaf.set_value(loaded[path])
    wanted = Res2Net(
        override(saved.arch, **(arch or {})),
        num_classes=saved.num_classes if num_classes is None else num_classes,
        in_chans=saved.in_chans if in_chans is None else in_chans,
        dtype=dtype,
        param_dtype=saved.param_dtype,
        name=saved.name,
        class_names=saved.class_names if num_classes in (None, saved.num_classes) else None,
    )
    return adapt(saved, wanted, sharding=place, seed=seed).eval()


def abstract_model(metadata: dict[str, Any], *, dtype=None, param_dtype=None) -> Res2Net:
    """The model that :func:`describe` described, without its arrays."""
    config = dict(metadata["model"])
    config["param_dtype"] = param_dtype or config["param_dtype"]
    return Res2Net(Arch(**config.pop("arch")), dtype=dtype, **config)


def arrays(model: Res2Net) -> dict[str, jax.Array]:
    """The arrays to store, under their paths."""
    return {path: leaf.get_value() for path, leaf in variables(model).items()}


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
        "source": source or {},
        "certificate": certificate or NOT_CERTIFIED,
        "versions": versions("res2net_jax", "jax", "flax", "orbax-checkpoint", "numpy"),
    }


def read_metadata(folder: str | os.PathLike) -> dict[str, Any]:
    """What :func:`describe` stored in ``folder``.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It is no checkpoint of a Res2Net, or one of a later format.
    """
    from orbax.checkpoint import v1 as ocp

    folder = locate(folder)
    try:
        metadata = ocp.checkpointables_metadata(folder).custom_metadata
    except Exception as error:
        raise ValueError(f"{folder} is not a readable Orbax checkpoint: {_first_line(error)}") from error
    if not isinstance(metadata, dict) or "format" not in metadata or "model" not in metadata:
        raise ValueError(
            f"{folder} is an Orbax checkpoint, but not one of a Res2Net by res2net_jax; or its metadata is damaged"
        )
    if metadata["format"] != FORMAT:
        raise ValueError(
            f"{folder} has checkpoint format {metadata['format']!r}; this version of res2net_jax reads format "
            f"{FORMAT}. Upgrade res2net_jax, or port the release again"
        )
    return metadata


def locate(folder: str | os.PathLike) -> Path:
    """``folder`` if it is a checkpoint, else the newest numbered checkpoint in it."""
    folder = Path(folder).absolute()
    if is_checkpoint(folder):
        return folder
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    steps = [child for child in folder.iterdir() if child.name.isdigit() and is_checkpoint(child)]
    if not steps:
        raise ValueError(
            f"{folder} is not a checkpoint; expected a folder written by res2net_jax.save, "
            "python -m porting, or python -m train.imagenet"
        )
    return max(steps, key=lambda step: int(step.name))


def is_checkpoint(folder: Path) -> bool:
    return (folder / "_CHECKPOINT_METADATA").is_file()


def cache_home(cache_dir: str | os.PathLike | None = None) -> Path:
    """``cache_dir``, else ``$RES2NET_JAX_HOME``, else the platform's cache folder."""
    import platformdirs

    return Path(
        cache_dir or os.environ.get("RES2NET_JAX_HOME") or platformdirs.user_cache_dir("res2net_jax")
    ).absolute()


def lock(folder: Path):
    """A lock among processes for whoever writes ``folder``; within one process it may be taken again."""
    import filelock

    folder.parent.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(folder.parent / f".{folder.name}.lock", is_singleton=True)


def remove_leftovers(folder: Path) -> None:
    """Clears what killed writers of ``folder`` left. Call it under :func:`lock`."""
    for leftover in folder.parent.glob(_leftover_prefix(folder) + "*"):
        if (leftover / "old").exists() and not folder.exists():
            os.rename(leftover / "old", folder)
        shutil.rmtree(leftover, ignore_errors=True)


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of ``packages`` and of Python, for the record."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def explain_write(error: Exception, folder: Path) -> Exception:
    """An error of writing to ``folder`` in plain words, or ``error`` itself if it is of another kind."""
    if isinstance(error, OSError) and error.errno in (
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOTDIR,
        errno.EEXIST,
    ):
        return PermissionError(
            error.errno,
            f"cannot write {folder} ({os.strerror(error.errno)}); choose another place, for the cache with "
            "cache_dir= or RES2NET_JAX_HOME",
        )
    full = ("No space left", "ENOSPC", "RESOURCE_EXHAUSTED", "File too large", "EFBIG", "Disk quota")
    if any(sign in str(error) for sign in full):
        return OSError(errno.ENOSPC, f"no space to write {folder}; nothing was left behind")
    return error


def _leftover_prefix(folder):
    return f".{folder.name}.tmp-"


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
