"""A file of features that is killed, or runs out of space: what is there then, and that it continues."""

import os
import resource
import shutil

import numpy as np
import pytest

from res2net_jax import feature_file
from res2net_jax.feature_file import FeatureFile


class Killed(BaseException):
    pass


def write_rows(target, overwrite=False):
    """The life of a feature file, in batches of two rows."""
    names = [f"p{i}.jpg" for i in range(7)]
    file = FeatureFile(target, names, (3, 2), {"model": "m"}, overwrite=overwrite)
    values = np.arange(42, dtype="float32").reshape(7, 3, 2)
    if not file.finished:
        todo = [*file.again, *range(file.rows, 7)]
        for rows in (todo[i : i + 2] for i in range(0, len(todo), 2)):
            file.write(values[rows], {row: "broken" if row == 3 else None for row in rows})
        file.finish()
    return file


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_kill_at_any_step(tmp_path, monkeypatch, suffix):
    """Each call that touches the disk is once the last one, before or after it has done its work."""
    write_rows(tmp_path / f"whole{suffix}")
    files = {f"f{name.suffix}": name.read_bytes() for name in tmp_path.glob("whole.*")}  # of .npy the names too
    steps = [(os, "fsync"), (os, "rename"), (os, "replace"), (os, "truncate"), (feature_file.shutil, "rmtree")]
    steps += [(FeatureFile, "_record"), (FeatureFile, "_require_space"), (feature_file.np.lib.format, "read_magic")]
    countdown = [0]

    def killing(function):
        def call(*arguments, **options):
            countdown[0] -= 1
            if countdown[0] == 0:
                raise Killed
            result = function(*arguments, **options)
            countdown[0] -= 1
            if countdown[0] == 0:
                raise Killed
            return result

        return call

    for owner, name in steps:
        monkeypatch.setattr(owner, name, killing(getattr(owner, name)))
    kills = 0
    for moment in range(1, 200):
        target = tmp_path / str(moment) / f"f{suffix}"
        target.parent.mkdir()
        killed = False
        for again in (moment, 3, 0):  # the second run is killed early
            countdown[0] = again
            try:
                file = write_rows(target)
                break
            except Killed:
                killed = True
            except FileExistsError:  # killed when all was done
                assert moment > 20 and not (target.parent / f".f{suffix}.part").exists()
                break
        countdown[0] = 0
        assert {file.name: file.read_bytes() for file in target.parent.glob("f.*")} == files, moment
        assert not (target.parent / f".f{suffix}.part").exists()
        kills += killed
        if not killed:
            break
    assert kills > 20 and file.unreadable == {3: "broken"}


def test_torn_lines_and_rows(tmp_path):
    """What is on the disk after a kill in the middle of a write, or a loss of power."""
    write_rows(tmp_path / "whole.npy")
    target = tmp_path / "f.npy"
    names = [f"p{i}.jpg" for i in range(7)]
    file = FeatureFile(target, names, (3, 2), {"model": "m"}, overwrite=False)
    file.write(np.arange(12, dtype="float32").reshape(2, 3, 2), {0: None, 1: None})
    for name, tail in (("rows.npy", b"half a row"), ("progress.jsonl", b'{"rows": 4, "unrea')):
        with open(file.folder / name, "ab") as half:
            half.write(tail)
    again = write_rows(target)
    assert again.finished and target.read_bytes() == (tmp_path / "whole.npy").read_bytes()


@pytest.mark.parametrize("moment", ["made", "removed"])
def test_an_old_file_is_not_taken_for_the_new_one(tmp_path, monkeypatch, moment):
    target = tmp_path / "f.npz"
    target.write_text("old")
    begun = FeatureFile(target, [f"p{i}.jpg" for i in range(7)], (3, 2), {"model": "m"}, overwrite=True)

    def remove(folder, **_):  # nearly
        (folder / "rows.npy").unlink()
        raise Killed

    if moment == "made":
        shutil.rmtree(begun.folder)
        begun.folder.mkdir()
    else:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(feature_file.shutil, "rmtree", remove)
            begun.discard()
    with pytest.raises(FileExistsError, match="--force"):
        write_rows(target)
    assert target.read_text() == "old" and not begun.folder.exists()
    assert write_rows(target, overwrite=True).finished and target.read_bytes() != b"old"


def test_a_full_disk_keeps_the_rows(tmp_path, monkeypatch):
    write_rows(tmp_path / "whole.npy")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))  # the header and three of seven rows
    try:
        with pytest.raises(OSError, match="2 of its 7 rows are kept in .*give the same command again"):
            write_rows(tmp_path / "f.npy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "f.npy").exists()
    write_rows(tmp_path / "f.npy")
    assert (tmp_path / "f.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()

    class Usage:
        free = 100

    monkeypatch.setattr(feature_file.shutil, "disk_usage", lambda folder: Usage)
    with pytest.raises(OSError, match="needs 0.0 GB to be written; 0.0 GB are free"):
        write_rows(tmp_path / "g.npy")


def test_a_stamp_tells_pictures_of_another_size_or_time_apart(tmp_path):
    picture, stamps = tmp_path / "p.jpg", set()
    for content, time in ((b"a", 1), (b"a", 2), (b"ab", 2)):
        picture.write_bytes(content)
        os.utime(picture, ns=(time, time))
        stamps.add(tuple(feature_file.stamp(picture)))
    assert len(stamps) == 3
