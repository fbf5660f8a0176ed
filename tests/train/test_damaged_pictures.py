"""What becomes of pictures that cannot be read."""

import io
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from batches import PLAIN, assert_same, take
from PIL import Image

from res2net_jax.variants import Preprocessing
from train.data import eval_batches, train_batches
from train.datasets import Dataset
from train.sources import Files
from train.transforms import UnreadablePicture

ROOT = str(Path(__file__).parents[2])


@pytest.fixture
def damaged(tmp_path):
    """Eight pictures; numbers 2 and 3 are text and half a JPEG, and 5 has vanished."""
    paths = []
    for i in range(8):
        file = io.BytesIO()
        Image.new("RGB", (40, 30), (i * 30, 0, 0)).save(file, "PNG" if i != 3 else "JPEG")
        data = {2: b"<html>404</html>", 3: file.getvalue()[:200]}.get(i, file.getvalue())
        paths.append(f"{i}.img")
        (tmp_path / paths[-1]).write_bytes(data)
    (tmp_path / "5.img").unlink()
    source = Files(str(tmp_path), np.array([os.fsencode(path) for path in paths]), np.arange(8, dtype=np.int32))
    return Dataset("damaged", "train", source, 8)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pictures_are_named_replaced_and_counted(damaged, workers, capsys):
    batches = train_batches(damaged, size=16, batch_size=4, seed=0, workers=workers, augment=PLAIN)
    try:
        labels = [next(batches)["label"].tolist() for _ in range(6)]  # three epochs
        assert batches.replaced == 9
        assert batches.get_state() == {"step": 6, "replaced": 9}
    finally:
        batches.close()
    assert Counter(sum(labels, [])) == {0: 3, 1: 3, 4: 3 + 6, 6: 3 + 3, 7: 3}
    messages = capsys.readouterr().err.splitlines()
    assert len(messages) == 3, "each is named once"
    assert all("replaced a picture that cannot be read: " in message for message in messages)
    for number, reason in ((2, "it is in no known picture format"), (3, "Truncated"), (5, "No such file")):
        (line,) = [message for message in messages if f"{number}.img" in message]
        assert reason in line


def test_the_trainer_goes_on_without_an_unreadable_picture(tmp_path):
    for split, count in (("train", 8), ("val", 2)):
        for label in "ab":
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 30), (i * 20, 90, 0)).save(tmp_path / split / label / f"{i}.png")
    (tmp_path / "train" / "a" / "3.png").write_text("<html>404</html>")
    model = ("--layers", "1", "1", "--channels", "16", "32", "--size", "32", "--batchnorm-group", "None")
    data = ("--dataset", f"folder:{tmp_path}", "--batch-size", "4", "--epochs", "2", "--workers", "1")
    result = subprocess.run(
        [sys.executable, "-m", "train.imagenet", *model, *data, "--output", tmp_path / "run"],
        env={**os.environ, "PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count(f"{tmp_path / 'train' / 'a' / '3.png'}: it is in no known picture format") == 1
    assert "2 pictures could not be read and were replaced" in result.stdout


def test_replacement_is_the_same_in_every_run(damaged):
    runs = [take(train_batches(damaged, size=16, batch_size=3, seed=4, workers=workers), 4) for workers in (0, 2)]
    assert_same(*runs)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_picture_stops_an_evaluation(damaged, workers):
    batches = eval_batches(damaged, preprocessing=Preprocessing(size=16), batch_size=2, workers=workers)
    assert next(batches)["mask"].all()
    with pytest.raises(UnreadablePicture, match=r"2\.img cannot be read .*so the evaluation stops"):
        for _ in range(3):
            next(batches)
    batches.close()


def test_nothing_but_unreadable_pictures_is_an_error():
    source = Files("/nowhere", np.array([b"rubbish"] * 100), np.zeros(100, np.int32))
    dataset = Dataset("rubbish", "train", source, 1)
    batches = train_batches(dataset, size=8, batch_size=2, seed=0)
    with pytest.raises(UnreadablePicture, match="32 pictures in a row cannot be read, from .*rubbish"):
        next(batches)
    batches.close()
