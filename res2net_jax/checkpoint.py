"""A model on disk: an Orbax checkpoint that says which model it holds, whence, and whether it was certified.

The arrays are the item ``model``, a flat dict under the paths of :func:`res2net_jax.init.variables`;
everything else is the checkpoint's custom metadata, plain JSON. Neither depends on a Flax version.
A trainer may store more items beside ``model``, and a folder of numbered steps is read as its newest one.
"""

import contextlib
import logging
import os
import sys
import tempfile
import threading
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from res2net_jax.adapt import adapt, asked_for
from res2net_jax.arch import override
from res2net_jax.files import (
    first_line,
    leftover_prefix,
    leftovers,
    lock,
    remove_leftovers,
    require_checkpoint_path,
    require_local,
    writing,
)
from res2net_jax.init import require_model, seed_of, variables
from res2net_jax.metadata import abstract_model, describe, is_checkpoint, locate, read_metadata
from res2net_jax.model import Res2Net
from res2net_jax.provenance import release_of

_OF_ORBAX = ("model", "orbax.checkpoint", "commit_success.txt")  # and what begins with _

#: To read a checkpoint that others replace, or a run's newest one while it trains.
ATTEMPTS = 10

# Orbax numbers its operations for the whole process: a save during which another thread reads makes its folders twice,
# or waits for them in vain.
_ORBAX = threading.RLock()


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
    In a job of several processes (jax.distributed) all call it, with arrays that span them.

    Args:
        model: The model. Arrays are stored in the type they have, and come back in the model's ``param_dtype``; the
            computation type is not kept: give it to ``load``.
        folder: Where to. Its parent is made if need be.
        overwrite: Replaces a checkpoint that is already there.
        source: Where the weights are from, as JSON; of a model that was loaded, its release is added.
        certificate: What :func:`porting.parity.certify` said of them.

    Raises:
        ValueError: A model that is fused, cut to a backbone, without weights, or with other layers than its attributes
            say.
        FileExistsError: ``folder`` exists and is not empty, and ``overwrite`` is False or it holds anything but a
            checkpoint, which is left alone.
        OSError: No permission or no space; nothing is left behind.
    """
    from orbax.checkpoint import v1 as ocp

    require_model(model)
    if model.bn1.folded:
        raise ValueError("a fused model is for inference alone; save the one it was made from")
    if len(model.stages) < len(model.arch.layers):
        raise ValueError("this model was cut to a backbone; keep nnx.state(model) with Orbax, or save the whole one")
    if any(isinstance(value, jax.ShapeDtypeStruct) for value in arrays(model).values()):
        raise ValueError("this model only describes itself; res2net_jax.create or load gives one with weights")
    require_checkpoint_path(folder)
    folder = Path(folder).expanduser().absolute()
    metadata = describe(model, source=source, certificate=certificate)
    _require_described(model, metadata)
    if jax.process_count() > 1:  # Orbax renames when all have written
        require_free(folder, overwrite)
        with _ORBAX:
            ocp.save_checkpointables(folder, {"model": arrays(model)}, overwrite=overwrite, custom_metadata=metadata)
        return folder
    metadata["crc32"] = {path: crc32(value) for path, value in arrays(model).items()}
    with lock(folder), writing(folder):
        require_free(folder, overwrite)
        remove_leftovers(folder)
        temporary = Path(tempfile.mkdtemp(prefix=leftover_prefix(folder), dir=folder.parent))
        try:
            with _ORBAX:
                ocp.save_checkpointables(temporary / "new", {"model": arrays(model)}, custom_metadata=metadata)
            if folder.exists():
                os.rename(folder, temporary / "old")
            os.rename(temporary / "new", folder)
        finally:
            remove_leftovers(folder)  # and, interrupted between the two, what was there before is put back
    return folder


def load(folder: str | os.PathLike, **options) -> Res2Net:
    """The model in ``folder``, in eval mode. Options as in :func:`restore`.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It is no checkpoint of a Res2Net, one of a later format, or damaged.
    """
    require_local(folder)
    folder = Path(folder).expanduser().absolute()
    for _ in range(ATTEMPTS - 1):
        before = _identity(folder)
        try:
            return restore(folder, **options)
        except (FileNotFoundError, ValueError):
            if jax.process_count() > 1 or not (leftovers(folder) or _identity(folder) != before):
                raise
        # Somebody has replaced it meanwhile, or a run has deleted it, which has newer ones; or somebody is about to, or
        # was killed in it: then wait, and set right.
        if leftovers(folder):
            with lock(folder):
                remove_leftovers(folder)
    return restore(folder, **options)


def restore(
    folder: str | os.PathLike,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    dtype=None,
    param_dtype=None,
    sharding: jax.sharding.Sharding | None = None,
    rngs: int | nnx.Rngs | jax.Array = 0,
    arch: dict[str, Any] | None = None,
) -> Res2Net:
    """Reads the arrays, with ``sharding`` straight to their devices, and fits them to the model that is asked for.

    Args:
        folder: A checkpoint, or a folder of numbered ones.
        num_classes: Another number than the checkpoint's gives a fresh classifier.
        in_chans: Another number than 3 fits the first convolution.
        dtype: Computation type.
        param_dtype: Type of the weights, by default as stored.
        sharding: Where the arrays go, and stay; by default JAX's default device, from which they follow other arrays.
        rngs: Seed of a fresh classifier.
        arch: Fields of :class:`Arch` to change.
    """
    folder = locate(folder)
    metadata = read_metadata(folder)
    saved = abstract_model(metadata, dtype=dtype)
    # A mistake in the options shows before anything is read.
    wanted = asked_for(saved, num_classes, in_chans, param_dtype, override(saved.arch, **(arch or {})))
    seed = seed_of(rngs)
    _fill(saved, folder, sharding, metadata)
    return (saved if wanted is saved else adapt(saved, wanted, sharding=sharding, seed=seed)).eval()


def arrays(model: Res2Net) -> dict[str, jax.Array]:
    """The arrays to store, under their paths."""
    return {path: leaf.get_value() for path, leaf in variables(model).items()}


def require_free(folder: Path, overwrite: bool = False) -> None:
    """FileExistsError if something is there that is not to be replaced; an empty folder is nothing."""
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return
    if not is_checkpoint(folder):
        raise FileExistsError(f"{folder} exists; it is not a checkpoint, so it is left alone. Give another folder")
    names = sorted(child.name for child in folder.iterdir())
    if others := [name for name in names if name[0] not in "_." and name not in _OF_ORBAX]:
        raise FileExistsError(
            f"{folder} holds more than a model ({', '.join(others[:3])}), so it is left alone. Give another folder"
        )
    if not overwrite:
        raise FileExistsError(f"{folder} exists; pass overwrite=True (--force) to replace it")


def _require_described(model, metadata):
    """ValueError unless ``load`` would make the same arrays of ``metadata``."""
    expected = {path: leaf.shape for path, leaf in variables(abstract_model(metadata)).items()}
    given = {path: jnp.shape(value) for path, value in arrays(model).items()}
    lines = [
        f"{path}: {given.get(path, 'missing')}, expected {expected.get(path, 'none')}"
        for path in sorted(expected.keys() | given.keys())
        if given.get(path) != expected.get(path)
    ]
    if lines:
        raise ValueError(
            f"this model's layers are not those that its attributes describe (num_classes={model.num_classes} and so "
            "on), so load could not restore it; model.reset_classifier(N) replaces a classifier, create(NAME, ...) "
            "makes another architecture:\n  " + "\n  ".join(lines)
        )


def _identity(folder):
    """Of the checkpoint that is read: its place, and what another folder there would not have."""
    try:
        found = locate(folder)
        return found, found.stat().st_ino
    except (OSError, ValueError):
        return None


def _fill(model, folder, sharding, metadata):
    """Puts the arrays in ``folder`` into the abstract ``model``.

    Without ``sharding`` they come as numpy's, for those that Orbax makes are committed to their device: a training step
    would then be compiled twice, since what an optimiser begins with is not.
    """
    from orbax.checkpoint import v1 as ocp

    leaves, checksums, release = variables(model), metadata.get("crc32") or {}, release_of(metadata)
    advice = f"delete it and port it again (python -m porting {release.name})" if release else "take another one"
    target = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        if sharding
        else np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
        for path, leaf in leaves.items()
    }
    handled = sys.exception()  # by our caller
    try:
        with _ORBAX, _quiet():
            loaded = ocp.load_checkpointables(folder, {"model": target})["model"]
    except Exception as error:
        raise ValueError(
            f"the checkpoint {folder} cannot be read, it seems to be damaged; {advice}. Orbax says: "
            f"{_cause(error, handled)}"
        ) from error
    for path, leaf in leaves.items():
        # Orbax reads in threads of its own, where a local enable_x64 has no effect.
        value = loaded[path]
        if not value.dtype == leaf.dtype == jax.dtypes.canonicalize_dtype(leaf.dtype):
            raise ValueError(
                'a float64 checkpoint needs jax.config.update("jax_enable_x64", True), for the whole program'
            )
        if value.shape != leaf.shape:
            raise ValueError(
                f"the checkpoint {folder} does not hold the model that it describes: {path} is {value.shape}, expected "
                f"{leaf.shape}; {advice}"
            )
        # Orbax does not notice a flipped bit. What it has cast cannot be compared.
        dtype, _ = saved = checksums.get(path, [None, None])
        whole = isinstance(value, np.ndarray) or value.is_fully_addressable
        if dtype == leaf.dtype.name and whole and crc32(value) != saved:
            raise ValueError(f"the checkpoint {folder} is damaged: {path} is not what was saved; {advice}")
        leaf.set_value(jnp.asarray(value))


def _cause(error, handled):
    """The innermost cause, which Orbax wraps in messages about its own handlers.

    Not further than ``handled``, the exception that our caller was already handling.
    """
    while (before := error.__cause__ or error.__context__) not in (None, handled):
        error = before
    return first_line(error).partition(" [tensorstore_spec")[0]


def crc32(value: jax.Array | np.ndarray) -> list[str | int]:
    """The type of an array and the checksum of its bytes, as the metadata's ``crc32`` has them for each path."""
    return [value.dtype.name, zlib.crc32(np.ascontiguousarray(value).view(np.uint8))]


@contextlib.contextmanager
def _quiet():
    """Keeps what Orbax logs of a damaged checkpoint, hundreds of lines, from hiding our one."""
    loggers = [logging.getLogger("absl"), logging.getLogger("asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
