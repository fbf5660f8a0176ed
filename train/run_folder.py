"""The folder of a run's checkpoints: what is there, and how what a killed process left there is put right.

All processes of a run may call these, but those that change something do so in process 0 alone.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from res2net_jax.command_line import say
from res2net_jax.files import remove_tree
from res2net_jax.metadata import OLD, numbered, stored_metadata
from train.devices import everywhere


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
        except Exception:  # damaged too, which is said if it should be read
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
