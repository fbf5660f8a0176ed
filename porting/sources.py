"""A file, URL or hub id -> the arrays of a PyTorch release, verified."""

import argparse
import dataclasses
import json
import os
import re
import zipfile
from pathlib import Path

import numpy as np

from porting import download, hashing
from porting.convert import to_numpy
from res2net_jax.files import first_line
from res2net_jax.provenance import without_secrets

_HUB_ID = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_FILE = re.compile(r"\.(pth|pt|bin|tar|safetensors)$")
_NESTINGS = ("state_dict_ema", "model_ema", "state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")


@dataclasses.dataclass(frozen=True)
class Release:
    """A weights file on this machine. ``origin`` says where it came from, ``sha256`` what is in it."""

    path: Path
    origin: str
    sha256: str

    @property
    def size(self) -> int:
        """In bytes."""
        return self.path.stat().st_size


def read(
    source: str | os.PathLike, *, check_hash: bool = True, cache_dir: str | os.PathLike | None = None
) -> dict[str, np.ndarray]:
    """The tensors of a PyTorch release under their torch keys.

    Wrappings (``state_dict``, ``model``, and their EMA twins, which win) and prefixes (``module.``,
    ``_orig_mod.``) are taken off. Values keep their type, but bfloat16, which numpy does not have, becomes float32.

    Args:
        source: A ``.pth`` file (zip or legacy format; needs torch), a ``.safetensors`` file, an
            ``http(s)`` URL of either, or a hub id ``"owner/name"`` (also ``"hf://owner/name@revision"``).
        check_hash: Compare the file's SHA-256 with the prefix in its name (torch.hub's convention).
        cache_dir: As in :func:`res2net_jax.load`; URLs are downloaded to its ``downloads``, and what is on the hub to
            its ``hub``, without ``cache_dir`` to the hub's own cache (``$HF_HOME``).

    Raises:
        FileNotFoundError: No such file or repository.
        ValueError: Wrong hash, damaged or truncated file, code inside, or no weights in it.
        OSError: No network, no permission, no space.
        ImportError: A ``.pth`` file, and no torch.
    """
    return read_file(fetch(source, check_hash=check_hash, cache_dir=cache_dir).path)


def fetch(source: str | os.PathLike, *, check_hash: bool = True, cache_dir: str | os.PathLike | None = None) -> Release:
    """``source`` as a file on this machine, downloaded if need be, its hash checked."""
    text = os.fspath(source)
    path = Path(text).expanduser()
    if text.startswith(("http://", "https://")):
        prefix = hashing.published_prefix(text) if check_hash else None
        path = download.from_url(text, cache_dir, sha256_prefix=prefix)
        return Release(path, without_secrets(text), hashing.sha256(path))
    if path.is_file():
        prefix = hashing.published_prefix(path.name) if check_hash else None
        return Release(path, str(path), hashing.require(path, prefix))
    hub_id = _HUB_ID.fullmatch(text)
    if hub_id and not _FILE.search(text) and not path.exists():
        repo, revision = hub_id.groups()
        path = download.from_hub(repo, revision, cache_dir=cache_dir)
        commit = path.parent.name  # for main and the like move
        return Release(path, f"hf://{repo}@{commit}", hashing.sha256(path))
    if path.is_dir():
        inside = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
        hint = f"there is {inside[0]} in it" if inside else "expected a .pth or .safetensors file, a URL, or a hub id"
        raise ValueError(f"{text} is a folder; {hint}")
    raise FileNotFoundError(f"there is no file {text}; expected a .pth or .safetensors file, a URL, or a hub id")


def read_file(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a local file, whose format is told by its first bytes."""
    with open(path, "rb") as file:
        head = file.read(4096)
    if not head:
        raise ValueError(f"{path} is empty")
    if head[8:9] == b"{":
        return _unwrap(_read_safetensors(path), path)
    if head[:4] == b"PK\x03\x04":
        _require_sound_zip(path)
        return _unwrap(_read_torch(path), path)
    if head[:1] == b"\x80":  # the legacy format
        return _unwrap(_read_torch(path), path)
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ValueError(f"{path} is a web page, not weights; the download address was probably wrong")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not weights; fetch the file itself (git lfs pull)")
    raise ValueError(f"{path} is neither a PyTorch nor a safetensors file; it begins with {head[:8]!r}")


def _read_safetensors(path):
    import safetensors
    import safetensors.numpy

    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from error
    except (AttributeError, TypeError) as error:  # e.g. float8
        raise ValueError(f"{path} holds numbers of a type that numpy does not have: {error}") from error


def _read_torch(path):
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs torch: pip install 'res2net_jax[port]', "
            "or take the .safetensors of the same release, which needs none"
        ) from error
    try:
        # Training checkpoints keep their command line as a Namespace; it holds plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if "unsupported" in str(error).lower():
            what = re.search(r"(?i)unsupported (?:global: )?(?:GLOBAL |class )?(\w+\.[\w.]+)", str(error))
            raise ValueError(
                f"{path} holds more than tensors ({what[1] if what else 'Python objects'}), which could run code "
                "when read, so it was not read. Save the state dict alone: torch.save(model.state_dict(), file)"
            ) from error
        raise ValueError(f"{path} is damaged or truncated: {first_line(error)}") from error


def _require_sound_zip(path):
    """ValueError unless the checksums in a zip hold, at which torch does not look."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.save does not compress. What does may be small here and fill the memory.
            sizes = sum(member.file_size for member in archive.infolist())
            bad = "its parts are larger than itself" if sizes > path.stat().st_size else archive.testzip()
    except PermissionError:
        raise
    except Exception as error:  # whatever the zip's parser stumbles on
        bad = first_line(error)
    if bad:
        raise ValueError(f"{path} is damaged or truncated: {bad}")


def _unwrap(content, path):
    for nesting in _NESTINGS:
        if isinstance(content, dict) and isinstance(content.get(nesting), dict):
            content = content[nesting]
            break
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds no state dict but {type(content).__name__}")
    arrays = {}
    for key, value in content.items():
        if not isinstance(key, str):
            raise ValueError(f"{path} holds no state dict: its keys are not names, one is {key!r}")
        while key.startswith(_PREFIXES):
            key = key.split(".", 1)[1]
        if not hasattr(value, "shape"):
            raise ValueError(f"{path} holds no state dict: {key!r} is a {type(value).__name__}, not a tensor")
        if key in arrays:
            raise ValueError(f"{path} holds {key!r} twice, with and without a prefix")
        try:
            arrays[key] = to_numpy(value)
        except (RuntimeError, TypeError) as error:  # float8, sparse, quantised, or larger than memory
            raise ValueError(f"{path}: {key!r} is a tensor that numpy does not have ({first_line(error)})") from error
    return arrays
