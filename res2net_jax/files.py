"""Folders that several processes write, any of which may be killed: locks, leftovers, plain errors, the cache."""

import contextlib
import errno
import glob
import importlib.metadata
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def cache_home(cache_dir: str | os.PathLike | None = None) -> Path:
    """``cache_dir``, else ``$RES2NET_JAX_HOME``, else the platform's cache folder."""
    import platformdirs

    home = cache_dir or os.environ.get("RES2NET_JAX_HOME") or platformdirs.user_cache_dir("res2net_jax")
    return Path(home).expanduser().absolute()


def require_local(path: str | os.PathLike) -> None:
    """ValueError for an address, such as ``gs://bucket/folder``, which would become a folder named ``gs:``."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", os.fspath(path)):
        raise ValueError(
            f"{os.fspath(path)} is an address, where a path is expected; mount a bucket (gs:// with gcsfuse)"
        )


def require_checkpoint_path(path: str | os.PathLike) -> None:
    """As :func:`require_local`, also for a ``[``: Orbax would take the path for a pattern, and lose the arrays."""
    require_local(path)
    if "[" in str(Path(path).expanduser().absolute()):
        raise ValueError(f"{path}: Orbax cannot write a checkpoint to a folder with [ in its path; choose another one")


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing ``folder``; within one process it may be taken again."""
    import filelock

    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(folder.parent / f".{folder.name}.lock", is_singleton=True)
        held.acquire()
    try:
        yield
    finally:
        held.release()


def leftover_prefix(folder: Path) -> str:
    """How the names of temporary folders for ``folder`` begin."""
    return f".{folder.name}.tmp-"


def leftovers(folder: Path) -> list[Path]:
    """The temporary folders of those who are writing ``folder``, or were killed in it."""
    return list(folder.parent.glob(glob.escape(leftover_prefix(folder)) + "*"))


def remove_leftovers(folder: Path) -> None:
    """Clears what killed writers of ``folder`` left, and puts back what they had moved. Call it under :func:`lock`."""
    for leftover in leftovers(folder):
        if (leftover / "old").exists() and not folder.exists():
            os.rename(leftover / "old", folder)
        remove_tree(leftover)


def remove_tree(folder: Path) -> None:
    """Removes ``folder``; after a failed save Orbax may still be writing to it in other threads for a moment."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)
        if not folder.exists():
            return


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turns errors of writing ``target`` into plain words; others pass."""
    try:
        yield
    except FileExistsError as error:
        if error.errno is None:  # ours, not the system's
            raise
        raise _no_permission(target, error) from error
    except (PermissionError, NotADirectoryError) as error:
        raise _no_permission(target, error) from error
    except Exception as error:
        if out_of_memory(error):
            raise
        read_only = isinstance(error, OSError) and error.errno == errno.EROFS
        if read_only:
            raise _no_permission(target, error) from error
        full = ("No space left", "ENOSPC", "RESOURCE_EXHAUSTED", "File too large", "EFBIG", "Disk quota", "StorageFull")
        if any(sign in str(error) for sign in full):
            raise OSError(errno.ENOSPC, f"no space to write {target}; nothing was left behind") from error
        raise


def out_of_memory(error: Exception) -> bool:
    """Whether the host's or a device's memory did not suffice. Of a full disk Orbax says RESOURCE_EXHAUSTED too."""
    import jax

    of_device = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    return of_device or isinstance(error, MemoryError)


def first_line(error: BaseException) -> str:
    """What an exception says, in at most 300 characters; its type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def replacing(file: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary path beside ``file``, which becomes ``file`` when the block has ended well; else nothing is left.

    Raises:
        ValueError: ``file`` is an address.
        FileExistsError: ``file`` exists and ``overwrite`` is False, or it is a folder or a device.
        OSError: No permission, no space.
    """
    check_new(file, overwrite)
    temporary = file.with_name(f".{secrets.token_hex(8)}.tmp{file.suffix}")  # short: the name may be long
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_file(file: Path, *, overwrite: bool = False, binary: bool = False) -> Iterator[IO]:
    """Opens what becomes ``file`` as by :func:`replacing`."""
    # Names of files may hold bytes that are no UTF-8; they come out as they were.
    text = {} if binary else {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    with (
        replacing(file, overwrite=overwrite) as temporary,
        open(temporary, "wb" if binary else "w", **text) as stream,
    ):
        yield stream


def check_new(file: Path, overwrite: bool = False) -> None:
    """Raises what :func:`replacing` raises for a file that exists, before any work is done."""
    require_local(file)
    if file.exists() and not file.is_file() or file.parent == Path("/dev"):
        raise FileExistsError(f"{file} is a folder or a device; name a file to write")
    if file.exists() and not overwrite:
        raise FileExistsError(f"{file} exists; --force replaces it (overwrite=True)")


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of ``packages`` and of Python, for the record."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _no_permission(target, error):
    if isinstance(error, PermissionError) and error.errno is None:  # in plain words already
        return error
    return PermissionError(
        f"cannot write {target} ({os.strerror(error.errno)}); choose another place, for the cache with cache_dir= "
        "or RES2NET_JAX_HOME"
    )
