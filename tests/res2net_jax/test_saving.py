"""What a save does to the folder, to what was there, and to others who save or read at the same time."""

import concurrent.futures
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

import res2net_jax
from res2net_jax import checkpoint, files

SMALL = {"layers": (1, 1), "channels": (16, 32)}


@pytest.fixture
def model():
    return res2net_jax.create("res2net50_26w_4s", num_classes=5, **SMALL).eval()


def same(a, b):
    a, b = checkpoint.arrays(a), checkpoint.arrays(b)
    return a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


def test_an_existing_folder_is_not_overwritten_by_accident(model, tmp_path):
    folder = res2net_jax.save(model, tmp_path / "m")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        res2net_jax.save(model, folder)
    other = res2net_jax.create("res2net50_26w_4s", num_classes=5, rngs=1, **SMALL)
    res2net_jax.save(other, folder, overwrite=True)
    assert same(res2net_jax.load(folder), other)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").touch()
    with pytest.raises(FileExistsError, match="not a checkpoint, so it is left alone"):
        res2net_jax.save(model, tmp_path / "thesis", overwrite=True)


def test_an_empty_folder_takes_a_checkpoint(model, tmp_path):
    (tmp_path / "m").mkdir()
    assert same(res2net_jax.load(res2net_jax.save(model, tmp_path / "m")), model)


def test_a_full_disk_leaves_nothing(tmp_path):
    """A limit on the size of files stands for the disk: the writes fail in the same places."""
    program = f"""
import resource, signal
import res2net_jax
model = res2net_jax.create("res2net50_26w_4s", layers=(1, 1), channels=(64, 128))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    res2net_jax.save(model, {str(tmp_path / "m")!r})
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "no space to write" in done.stdout, done.stdout + done.stderr[-2000:]
    assert [path.name for path in tmp_path.iterdir()] == [".m.lock"]


def test_a_place_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PermissionError, match="choose another place"):
        res2net_jax.save(model, tmp_path / "file" / "m")


def test_one_of_several_savers_wins(model, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(res2net_jax.save, model, tmp_path / "m") for _ in range(4)]
    errors = [future.exception() for future in futures]
    assert errors.count(None) == 1
    assert all(isinstance(error, FileExistsError) for error in errors if error)


def test_a_reader_outlives_its_checkpoint_s_replacement(model, tmp_path):
    folder = res2net_jax.save(model, tmp_path / "m")
    stop = threading.Event()

    def replace():
        while not stop.is_set():
            res2net_jax.save(model, folder, overwrite=True)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        writer = pool.submit(replace)
        try:
            for _ in range(10):
                assert same(res2net_jax.load(folder), model)
        finally:
            stop.set()
        writer.result()


def test_a_reader_outlives_the_step_of_a_run_that_goes_on(model, tmp_path, monkeypatch):
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="run is a run of .* that has no checkpoint yet"):
        res2net_jax.load(tmp_path / "run")
    res2net_jax.save(model, checkpoints / "1")
    fill, read = checkpoint._fill, []

    def trained_on_meanwhile(model_to_fill, folder, *more):
        read.append(folder.name)
        if folder.name == "1":
            res2net_jax.save(model, checkpoints / "2")
            for file in [file for file in (folder / "model").rglob("*") if file.is_file()]:
                file.unlink()
        fill(model_to_fill, folder, *more)

    monkeypatch.setattr(checkpoint, "_fill", trained_on_meanwhile)
    assert same(res2net_jax.load(tmp_path / "run"), model) and read == ["1", "2"]
    shutil.rmtree(checkpoints / "2")
    with pytest.raises(ValueError, match="1 cannot be read, it seems to be damaged"):
        monkeypatch.setattr(checkpoint, "_fill", fill)
        res2net_jax.load(tmp_path / "run")


def test_leftovers_of_a_killed_writer_are_cleared(model, tmp_path):
    (tmp_path / ".m.tmp-dead").mkdir()
    (tmp_path / ".m.tmp-dead" / "half").touch()
    folder = res2net_jax.save(model, tmp_path / "m")
    (tmp_path / ".m.tmp-dead2").mkdir()
    folder.rename(tmp_path / ".m.tmp-dead2" / "old")  # killed between the two renames of an overwrite
    with files.lock(folder):
        files.remove_leftovers(folder)
    assert same(res2net_jax.load(folder), model)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".m.lock", "m"]


def test_an_overwrite_that_is_interrupted_keeps_what_was_there(model, tmp_path, monkeypatch):
    folder = res2net_jax.save(model, tmp_path / "m")
    other = res2net_jax.create("res2net50_26w_4s", num_classes=5, rngs=1, **SMALL)
    rename = os.rename

    def interrupted(source, target):
        if os.path.basename(source) == "new":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        res2net_jax.save(other, folder, overwrite=True)
    assert same(res2net_jax.load(folder), model)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".m.lock", "m"]


def test_a_name_with_wildcards(model, tmp_path):
    folder = tmp_path / "lr 0.?*"
    for _ in range(2):
        res2net_jax.save(model, folder, overwrite=True)
    assert same(res2net_jax.load(folder), model)
    with pytest.raises(ValueError, match=r"cannot write a checkpoint to a folder with \[ in its path"):
        res2net_jax.save(model, tmp_path / "lr[0.1]")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lr 0.?*.lock", "lr 0.?*"]
    folder.rename(tmp_path / "lr[0.1]")
    assert same(res2net_jax.load(tmp_path / "lr[0.1]"), model)
