"""A checkpoint that cannot be read just now is not a damaged one, and a failed save hides no other failure."""

import dataclasses
import errno
import os
import subprocess
import sys

import jax
import pytest

from train import checkpoints, devices, run_folder

from .conftest import ROOT, small, steps, train


def names(tmp_path):
    return sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())


def failing(error, times=10**6, read=checkpoints.ocp.load_checkpointables):
    """``read``, which raises ``error`` so many times first."""
    calls = []

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) <= times:
            raise error
        return read(*arguments)

    return fails


def wrapped(error):
    """As Orbax wraps it."""
    outer = KeyError("Failed to load checkpointable: model")
    outer.__cause__ = error
    return outer


def test_what_may_pass_changes_no_checkpoint(tmp_path, monkeypatch, capsys):
    config = small(tmp_path, steps=6, checkpoint_every=2)
    assert train(config) == 0
    before, longer = names(tmp_path), dataclasses.replace(config, steps=8)
    stumble = OSError(errno.EIO, "Input/output error")
    reads = [
        ("load", stumble),
        ("load", wrapped(stumble)),
        ("load", wrapped(ValueError("Error reading local file [os_error_code='116' message='Stale file handle']"))),
        ("load", PermissionError(errno.EACCES, "Permission denied")),
        ("load", MemoryError("no memory")),
        ("load", jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory on the device")),
        ("metadata", OSError(errno.EMFILE, "Too many open files")),
    ]
    for what, error in reads:
        where = (checkpoints.ocp, "load_checkpointables") if what == "load" else (checkpoints, "stored_metadata")
        with monkeypatch.context() as patch:
            patch.setattr(*where, failing(error))
            with pytest.raises(OSError, match="checkpoints/6 could not be read .* nothing was changed") as told:
                train(longer)
        assert str(run_folder._first_cause(error)).splitlines()[0] in str(told.value)
        assert names(tmp_path) == before
    capsys.readouterr()
    assert train(longer) == 0
    out, err = capsys.readouterr()
    assert "Resuming at step 6 of 8" in out and "damaged" not in err


def test_a_read_that_fails_once_is_tried_again(tmp_path, monkeypatch, capsys):
    config = small(tmp_path, steps=4, checkpoint_every=2)
    assert train(config) == 0
    before = names(tmp_path)
    monkeypatch.setattr(checkpoints.ocp, "load_checkpointables", failing(ValueError("DATA_LOSS"), times=1))
    capsys.readouterr()
    assert train(config) == 0
    out, err = capsys.readouterr()
    assert "Resuming at step 4 of 4" in out and "damaged" not in err
    assert names(tmp_path) == before


def test_what_no_checkpoint_passes_is_no_damage(tmp_path, monkeypatch):
    """Such as another version of Optax, whose state is another tree."""
    config = small(tmp_path, steps=4, checkpoint_every=2)
    assert train(config) == 0
    before, to_items = names(tmp_path), checkpoints.to_items

    def other_items(state):
        items = to_items(state)
        return {**items, "training": {**items["training"], "momentum[2].later": state["step"]}}

    monkeypatch.setattr(checkpoints, "to_items", other_items)
    with pytest.raises(ValueError, match="no checkpoint in .* can be read, .*; they are left as they were. If"):
        train(dataclasses.replace(config, steps=6))
    assert names(tmp_path) == before


@pytest.mark.parametrize("action", ["mark_damaged", "put_back"])
def test_a_rename_that_fails_in_process_0_is_told_to_all(tmp_path, monkeypatch, action):
    config = small(tmp_path, steps=4, checkpoint_every=2)
    assert train(config) == 0
    if action == "mark_damaged":
        (tmp_path / "run" / "checkpoints" / "4" / "_CHECKPOINT_METADATA").write_text("{")
    else:  # with what it calls at the start, put_right
        monkeypatch.setattr(run_folder, "put_right", lambda _: None)
    answers = []
    monkeypatch.setattr(devices, "everywhere", lambda ok: answers.append(ok) or ok)
    monkeypatch.setattr(run_folder, action, failing(OSError(errno.EIO, "unplugged")))
    with pytest.raises(OSError, match="unplugged"):
        train(dataclasses.replace(config, steps=6))
    assert False in answers, "the others were not told"


FAILED_SAVE = """
import os, resource, sys
from pathlib import Path
import jax
import res2net_jax
from train.checkpoints import Checkpoints
from train.config import Config
from train.step import init_state

folder = Path(sys.argv[1])
model = res2net_jax.create("res2net50_26w_4s", layers=(1,), channels=(8,), scale=2, num_classes=10)
config = Config(output=str(folder))
state = init_state(model, config)
saved = Checkpoints(folder, config, model, 10, {})
saved.finish(1, state, [])
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
saved.save(1, state, [], {"top1": 1.0})
saved.close()
print(*sorted(path.name for path in folder.iterdir()), flush=True)
os._exit(0)  # as a command does of which threads were left behind
"""


def test_to_close_after_a_failed_save_raises_nothing_and_leaves_no_trace(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-c", FAILED_SAVE, str(tmp_path / "checkpoints")]
    result = subprocess.run(program, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "WARNING: the last checkpoint could not be saved" in result.stderr
    assert result.stdout.split() == ["1"] == [str(step) for step in steps(tmp_path)]
