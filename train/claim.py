"""A run's folder belongs to one run at a time."""

import contextlib
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from res2net_jax.command_line import say
from res2net_jax.files import writing
from res2net_jax.metadata import is_checkpoint
from train.devices import everywhere, largest, together
from train.report import COLUMNS
from train.signals import StopRequest

if sys.platform != "win32":
    import fcntl


#: What a run writes.
_OF_A_RUN = {"checkpoints", "tensorboard", "config.json", "config.tmp", "metrics.csv"}
_OF_A_RUN |= {"curves.png", "confusion.png", "mistakes.png"}
#: What a shell or a cluster writes of a run that is about to begin.
_LOGS = {".log", ".out", ".err"}

PATIENCE = 90  # seconds, after which the clients of a file server have looked anew (NFS: 3 to 60)


@contextlib.contextmanager
def claim(folder: Path, stop: StopRequest | None = None, patience: int = 120) -> Iterator[int]:
    """Keeps other runs out of ``folder``, which is made, until the end of the context or of the process.

    All processes of a run call it together; process 0 holds the lock. Where the file system has no locks, and on
    Windows, nobody is kept out.

    Args:
        folder: The run's.
        stop: What a signal while it waits is noted in.
        patience: Seconds to wait for another run, which may have been told to stop and still save. A file server that
            has lost a host in mid-run keeps its lock for a while too (NFS: 90 s).

    Yields:
        0, or the signal that came to one of the processes while it waited; the folder is then not theirs.

    Raises:
        ValueError: Another run is at work there, there are files of its names that are not of a run, or the processes
            do not share the folder.
        FileExistsError: Something else than a run is there; it is left as it was.
        OSError: The folder cannot be made or written.
    """
    file = together(lambda: _open(folder) if jax.process_index() == 0 else None)
    try:
        for second in range(patience + 1):
            # Asked of all of them each second: XLA takes a process that is late for long as lost.
            if everywhere(_taken(file)):
                break
            if signum := largest(stop.signum if stop else 0):
                yield signum
                return
            if second == 0 and file is not None:
                say(f"Another run is at work in {folder}; waiting for it, {patience} seconds at most.")
            time.sleep(1 if second < patience else 0)
        else:
            raise ValueError(
                f"another run is at work in {folder}, for it holds {folder / '.lock'}; wait for it, or give another "
                "--output"
            )
        _require_shared(folder, first=file is not None)
        yield 0
    finally:
        if file is not None:
            file.close()  # which lets go


def _open(folder):
    with writing(folder):
        _require_run(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / ".lock").open("a")


def _require_run(folder):
    """Raises unless ``folder`` is absent, empty or a run's, also of one that was killed as it began.

    A run within a model would go with it when the model is replaced, and one among pictures would be taken for a class.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"--output {folder} is a file; name a folder")
    if not folder.exists() or any(map(is_checkpoint, (folder / "checkpoints").glob("[0-9]*"))):
        return
    if is_checkpoint(folder):
        raise FileExistsError(f"{folder} holds a model, not a run; give a new --output")
    for name, known in (("metrics.csv", [",".join(COLUMNS[:3])]), ("config.json", ['"model"', '"dataset"', '"lr"'])):
        file = folder / name
        if file.is_file() and not all(word.encode() in file.read_bytes() for word in known):
            raise ValueError(f"{file} is not of a run, and would be replaced; move it, or give another --output")
    names = sorted(child.name for child in folder.iterdir() if child.name not in _OF_A_RUN | {"lost+found"})
    others = [name for name in names if name[0] != "." and not _LOGS & set(Path(name).suffixes)]
    if others and not (folder / "config.json").exists():
        told = ", ".join(others[:3]) + (" ..." if len(others) > 3 else "")
        raise FileExistsError(f"{folder} holds other files ({told}), not a run; give a new --output")


def _require_shared(folder, first):
    """ValueError, in all processes, unless all of them see ``folder``: they save into it together."""
    if jax.process_count() == 1:
        return
    file = folder / ".shared"
    token = b"%d" % largest(secrets.randbelow(2**31) if first else 0)

    def sees():
        try:
            return file.read_bytes() == token
        except OSError:
            return False

    together(lambda: file.write_bytes(token) if first else None)
    try:
        for second in range(PATIENCE + 1):
            if everywhere(sees()):
                return
            time.sleep(1 if second < PATIENCE else 0)
    finally:
        if first:
            file.unlink(missing_ok=True)
    raise ValueError(
        f"--output {folder} is not the same folder for all {jax.process_count()} processes, which save into it "
        "together; name one on a file system that all hosts share"
    )


def _taken(file):
    """Whether ``file`` is ours, or there is nothing to take."""
    if file is None or sys.platform == "win32":
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
