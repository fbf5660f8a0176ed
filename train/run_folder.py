"""The folder of a run's checkpoints: what is there, what of it is damaged, and how what a kill left is put right.

All processes of a run may call these, but those that change something do so in process 0 alone.
"""

import errno
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import jax

from res2net_jax.command_line import say
from res2net_jax.files import first_line, remove_tree
from res2net_jax.metadata import OLD, numbered, stored_metadata
from train.devices import everywhere, together

T = TypeVar("T")


def saved_in(folder: Path) -> dict[int, Path]:
    """The checkpoints in ``folder`` by their steps, newest first; with those that a process died replacing."""
    return numbered(folder.iterdir()) if folder.is_dir() else {}


def set_aside(folder: Path, step: int) -> None:
    """Makes room for another checkpoint of ``step``, without a moment in which there is none."""
    if jax.process_index() == 0:
        os.rename(folder / str(step), folder / f"{step}{OLD}")


def put_back(folder: Path) -> None:
    """Ends what :func:`set_aside` began, also in an earlier process that was killed."""
    if jax.process_index() == 0:
        for old in folder.glob(f"[0-9]*{OLD}"):
            if not old.stem.isdigit():  # not ours
                continue
            if old.with_suffix("").exists():
                remove_tree(old)
            else:
                os.rename(old, old.with_suffix(""))


def put_right(folder: Path) -> None:
    """As :func:`put_back`, and writes damaged results anew: Orbax, which reads all to find the best, would fail."""
    put_back(folder)
    for step, checkpoint in saved_in(folder).items() if jax.process_index() == 0 else ():
        file = checkpoint / "metrics" / "metrics"
        if not file.exists() or _is_result(file):
            continue
        say(f"WARNING: the result of checkpoint {step} is damaged; it is taken from its metadata", sys.stderr)
        try:
            evaluation = stored_metadata(checkpoint)["train"]["evaluation"]
        except Exception as error:
            if not _is_damage(error):
                raise
            evaluation = None
        if evaluation is None:
            remove_tree(file.parent)
        else:
            file.write_text(json.dumps(evaluation))


def _is_result(file):
    try:
        return json.loads(file.read_bytes())["top1"] is not None
    except (ValueError, TypeError, KeyError):
        return False


def mark_damaged(folder: Path, step: int) -> None:
    """Keeps the checkpoint of ``step`` under a name by which none is looked for."""
    if jax.process_index() == 0:
        number, target = 0, folder / f"{step}.damaged"
        while target.exists():
            number += 1
            target = folder / f"{step}.damaged{number}"
        os.rename(folder / str(step), target)


def read(checkpoint: Path, what: str, action: Callable[[], T]) -> tuple[T | None, str | None]:
    """The result of ``action()``, which reads from ``checkpoint``, and None; or None, and that ``what`` is damaged.

    All processes call this, and what one has found is the answer to all of them.

    Raises:
        OSError: It failed in another way, in some process.
    """

    def attempt():
        try:
            return action(), None
        except Exception as error:
            reason = first_line(_first_cause(error))
            if not _is_damage(error):
                raise OSError(
                    f"{checkpoint} could not be read ({reason}), which does not mean that it is damaged; nothing was "
                    "changed, and the same command can be tried again. If this lasts, rename the checkpoint, and the "
                    "run continues from the one before"
                ) from error
            return None, f"{what} cannot be read ({reason})"

    result, problem = together(attempt)
    return (result, None) if everywhere(problem is None) else (None, problem or f"another process cannot read {what}")


def wait_until_visible(folder: Path, steps: Sequence[int], seconds: int = 90) -> None:
    """Until every host's view of a shared file system, which may be a minute old (NFS), has the checkpoints.

    Raises:
        ValueError: It has them not in so many seconds.
    """

    def visible():
        try:
            seen = saved_in(folder)
            return all(seen.get(step) == folder / str(step) for step in steps)
        except OSError:
            return False

    for _ in range(seconds):
        # Asked of all of them each second: XLA takes a process that is late for long as lost.
        if everywhere(visible()):
            return
        time.sleep(1)
    raise ValueError(f"not all processes see the checkpoints that process 0 sees in {folder}: {steps}")


def _is_damage(error):
    """Whether ``error``, from reading a checkpoint, speaks of its files: missing ones, or not what was written.

    Not if a file server, a limit of open files, a permission or the memory has failed, which may pass.
    """
    return not any(map(_is_of_the_system, _chain(error)))


def _first_cause(error):
    """What ``error`` came of; Orbax wraps it in words of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _chain(error):
    links = []
    while error is not None and error not in links:
        links.append(error)
        error = error.__cause__ or error.__context__
    return links


def _is_of_the_system(error):
    if isinstance(error, OSError):
        return not isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError))
    # Of tensorstore's errors only the text has the system's code.
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return isinstance(error, (MemoryError, jax.errors.JaxRuntimeError)) or bool(code and int(code[1]) != errno.ENOENT)
