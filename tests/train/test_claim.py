"""The folder of a run: one run at a time, and nothing that is not of a run."""

import errno
import functools
import shutil
import signal
from pathlib import Path

import pytest

import res2net_jax
from train import imagenet
from train.claim import claim
from train.imagenet import main
from train.signals import StopRequest

from .conftest import small, steps, train


def test_two_runs_in_one_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(imagenet, "claim", functools.partial(claim, patience=1))
    told = "another run is at work in .*; wait for it, or give another --output"
    with claim(tmp_path / "run"), pytest.raises(ValueError, match=told):
        train(small(tmp_path))
    assert "waiting for it" in capsys.readouterr().out
    assert not steps(tmp_path / "run")
    assert train(small(tmp_path)) == 0
    with claim(tmp_path / "run", patience=0):  # a run that is done has let go
        pass


def test_a_signal_ends_the_wait_for_another_run(tmp_path):
    with claim(tmp_path / "run"), StopRequest() as stop:
        stop.signum = signal.SIGTERM
        assert main(small(tmp_path), stop) == 128 + signal.SIGTERM
    assert not (tmp_path / "run" / "config.json").exists()


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(tmp_path, message):
    """The run's folder is refused with ``message``, and nothing in it has changed."""
    before = contents(tmp_path / "run")
    with pytest.raises(FileExistsError, match=message):
        train(small(tmp_path))
    assert contents(tmp_path / "run") == before


def test_a_model_is_no_place_for_a_run(tmp_path):
    res2net_jax.save(res2net_jax.create("res2net50_26w_4s", layers=(1,), channels=(8,), scale=2), tmp_path / "run")
    refused(tmp_path, "run holds a model, not a run; give a new --output")
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / "config.json").write_text("{}")  # such as the hub wants beside a model
    refused(tmp_path, "run holds a model, not a run; give a new --output")


def test_a_folder_of_other_files_is_no_place_for_a_run(tmp_path, pictures):
    pictures.rename(tmp_path / "run")
    refused(tmp_path, r"run holds other files \(train, val\), not a run; give a new --output")
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    for name in ("1.jpg", "2.jpg", "3.jpg", "4.jpg"):
        (tmp_path / "run" / name).touch()
    refused(tmp_path, r"run holds other files \(1.jpg, 2.jpg, 3.jpg ...\), not a run; give a new --output")


@pytest.mark.parametrize("beside", [".lock", "checkpoints", "tensorboard", "slurm-1.out"])
def test_one_name_of_a_run_makes_no_run(tmp_path, beside):
    (tmp_path / "run").mkdir()
    for name in (beside, "hparams.yaml"):
        (tmp_path / "run" / name).touch()
    refused(tmp_path, r"run holds other files \(hparams.yaml\), not a run")


@pytest.mark.parametrize(
    "left", [(), (".lock",), (".lock", ".shared"), (".lock", "config.tmp"), ("lost+found", "slurm-1.out.1")]
)
def test_what_a_run_leaves_that_is_killed_as_it_begins_is_a_run(tmp_path, left):
    (tmp_path / "run").mkdir()
    for name in ("slurm-1.out", "begun.log", ".DS_Store", *left):
        (tmp_path / "run" / name).touch()
    with claim(tmp_path / "run"):
        pass


def test_an_output_that_cannot_be_a_folder(tmp_path, monkeypatch):
    (tmp_path / "run").touch()
    with pytest.raises(FileExistsError, match="--output .*run is a file; name a folder"):
        train(small(tmp_path))
    with (
        pytest.raises(PermissionError, match="cannot write .*run/below .Not a directory."),
        claim(tmp_path / "run/below"),
    ):
        pass

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionError, match="cannot write .*new .Permission denied."), claim(tmp_path / "new"):
        pass


@pytest.mark.parametrize(("name", "content"), [("config.json", '{"model": 1}'), ("metrics.csv", "date,kg\n1.1.,70\n")])
def test_files_that_are_not_of_a_run_are_left_alone(tmp_path, name, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text(content)
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "epoch1.pth").touch()
    with pytest.raises(ValueError, match=f"{name} is not of a run, and would be replaced"):
        train(small(tmp_path))
    assert (tmp_path / "run" / name).read_text() == content


def test_what_else_is_in_the_folder_of_tensorboard_stays(tmp_path):
    (tmp_path / "elsewhere" / "mine").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").symlink_to(tmp_path / "elsewhere")
    for _ in range(2):
        assert train(small(tmp_path)) == 0
    names = sorted(path.name.split(".tfevents")[0] for path in (tmp_path / "elsewhere").iterdir())
    assert names == ["events.out", "mine"]
