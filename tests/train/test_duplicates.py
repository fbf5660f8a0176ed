"""A picture in two splits is named, whatever it is called there."""

import numpy as np
from PIL import Image

from train import duplicates
from train.datasets import open_dataset
from train.duplicates import warn_of_duplicates


def folder(root, shared):
    """Ten pictures of two classes in each split, all of one length; the first ``shared`` of ``val`` from ``train``."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(10):
            file = root / split / f"class {number % 2}" / f"ü {split} {number}.bmp"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(file)
            if split == "val" and number < shared:
                file.write_bytes((root / "train" / "class 1" / f"ü train {2 * number + 1}.bmp").read_bytes())
    return [open_dataset(f"folder:{root}", split) for split in ("train", "validation")]


def test_pictures_in_both_splits_are_named(tmp_path, capsys):
    warn_of_duplicates(*folder(tmp_path, shared=5))
    first, *named = capsys.readouterr().err.strip().splitlines()
    assert first.startswith("WARNING: 5 of the 10 pictures to evaluate on are among those to train on")
    assert named[0] == f"  {tmp_path}/val/class 0/ü val 0.bmp = {tmp_path}/train/class 1/ü train 1.bmp"
    assert len(named) == 4 and named[-1] == "  and 2 more"


def test_different_pictures_of_one_length_and_beginning_are_different(tmp_path, capsys):
    train, held_out = folder(tmp_path, shared=0)
    warn_of_duplicates(train, held_out)
    bytes_ = bytes(10_000)
    (tmp_path / "train/class 0/ü train 0.bmp").write_bytes(bytes_)
    (tmp_path / "val/class 0/ü val 0.bmp").write_bytes(bytes_[:-1] + b"x")
    warn_of_duplicates(train, held_out)
    (tmp_path / "val/class 1/ü val 1.bmp").unlink()
    warn_of_duplicates(train, held_out)
    assert capsys.readouterr().err == ""
    (tmp_path / "val/class 0/ü val 0.bmp").write_bytes(bytes_)
    warn_of_duplicates(train, held_out)
    assert "1 of the 10 pictures" in capsys.readouterr().err


def test_large_folders_and_other_sets_are_left_alone(tmp_path, capsys, monkeypatch):
    train, held_out = folder(tmp_path, shared=1)
    monkeypatch.setattr(duplicates, "MOST", 19)
    warn_of_duplicates(train, held_out)
    digits = open_dataset("digits", "train")
    warn_of_duplicates(digits, digits)
    assert capsys.readouterr().err == ""
