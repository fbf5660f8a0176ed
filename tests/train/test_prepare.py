"""ImageNet from its tars: TFDS's own builder on small ones, then the real commands on what it made."""

import contextlib
import csv
import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import res2net_jax
from res2net_jax.variants import Preprocessing
from train.config import Config
from train.data import eval_batches, train_batches
from train.datasets import imagenet_synsets, open_dataset
from train.start import open_splits
from train.transforms import UnreadablePicture

ROOT = Path(__file__).parents[2]
# The first three labels of the official validation set, so that what is learnt can be right.
TRAINED, PER_CLASS, VALIDATED = (65, 230, 970), 4, 7


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def jpeg(rng, width, height):
    file = io.BytesIO()
    small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
    small.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Small archives under the official names, laid out as the official ones."""
    folder = tmp_path_factory.mktemp("tars")
    rng = np.random.default_rng(0)
    synsets = list(imagenet_synsets())
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as train:
        for label in TRAINED:
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w") as inner:
                for k in range(PER_CLASS):
                    add(inner, f"{synsets[label]}_{k + 1}.JPEG", jpeg(rng, 80 + k, 60))
            add(train, f"{synsets[label]}.tar", file.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as validation:
        for k in range(VALIDATED):
            add(validation, f"ILSVRC2012_val_{k + 1:08d}.JPEG", jpeg(rng, 70, 90 + k))
    return folder


# Preparing happens in processes of its own: one that has imported TensorFlow crashes when it imports torch.
def command(module, *arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def data_dir(tars, tmp_path_factory):
    """Prepared by the command."""
    folder = tmp_path_factory.mktemp("tfds")
    result = command("train.prepare", "--manual-dir", tars, "--data-dir", folder, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "imagenet2012 train: 12 pictures (the complete ImageNet has 1,281,167)" in result.stdout
    assert "imagenet2012 validation: 7 pictures (the complete ImageNet has 50,000)" in result.stdout
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    model = res2net_jax.create("res2net50_26w_4s", layers=(1, 1), channels=(16, 32))
    return res2net_jax.save(model, tmp_path_factory.mktemp("model") / "small")


def test_examples_are_those_of_the_tars(data_dir, tars):
    dataset = open_dataset("imagenet2012", "train", data_dir=data_dir)
    assert dataset.num_classes == 1000 and dataset.class_names is None and dataset.class_subset is None
    synsets = list(imagenet_synsets())
    found = {}
    for i in range(len(dataset)):
        example = dataset.source[i]
        name = dataset.source.name(i).partition("(")[2].rstrip(")")
        assert synsets[example["label"]] == name.partition("_")[0]
        found[name] = example["image"]
    with tarfile.open(tars / "ILSVRC2012_img_train.tar") as outer:
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                for picture in inner:
                    assert found.pop(picture.name) == inner.extractfile(picture).read(), "the bytes are not the JPEG's"
    assert not found


def test_validation_labels_are_the_official_ones(data_dir):
    dataset = open_dataset("imagenet2012", "validation", data_dir=data_dir)
    labels = {dataset.source.name(i)[-14:-6]: dataset.source[i]["label"] for i in range(len(dataset))}
    # The first lines of the challenge's own ground truth: sea snake, ski, Shetland sheepdog, soup bowl, cradle, ...
    assert labels == dict(zip([f"{k:08d}" for k in range(1, 8)], [65, 970, 230, 809, 516, 57, 334], strict=True))


def test_batches_need_no_tensorflow(data_dir, tmp_path):
    script = tmp_path / "read.py"
    script.write_text(f"""
import sys
from importlib.machinery import PathFinder

class WithoutTensorflow(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "tensorflow" else super().find_spec(name, path, target)

sys.meta_path = [WithoutTensorflow if finder is PathFinder else finder for finder in sys.meta_path]
from train.data import train_batches
from train.datasets import open_dataset

if __name__ == "__main__":
    dataset = open_dataset("imagenet2012", "train", data_dir={str(data_dir)!r})
    batches = train_batches(dataset, size=32, batch_size=4, seed=0, workers=1)
    print(sorted(label for _ in range(3) for label in next(batches)["label"].tolist()))
    batches.close()
    print("torch" in sys.modules, "tensorflow" in sys.modules)
""")
    result = subprocess.run(
        [sys.executable, script], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [str([65] * 4 + [230] * 4 + [970] * 4), "False False"]


def test_evaluate_command(data_dir, model_folder, tmp_path):
    result = command(
        "train.evaluate",
        *("--model", model_folder, "--data-dir", data_dir, "--batch-size", 4),
        cwd=tmp_path,
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )
    assert result.returncode == 0, result.stderr
    assert "on imagenet2012, split validation: 7 images of 224 x 224 (crop 0.875, bilinear)" in result.stdout
    (row,) = csv.DictReader((tmp_path / "results-imagenet2012.csv").read_text().splitlines())
    assert row["model"] == str(model_folder) and row["img_size"] == "224"
    assert float(row["top1"]) + float(row["top1_err"]) == 100


def test_trained_and_evaluated_by_the_commands(data_dir, tmp_path):
    small = ("--layers", 1, 1, "--channels", 16, 32, "--size", 32, "--batch-size", 4, "--batchnorm-group", "None")
    run = ("--epochs", 2, "--lr", 6.4, "--workers", 1, "--output", "run")
    result = command("train.imagenet", "--data-dir", data_dir, *small, *run, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "12 pictures, 3 steps an epoch" in result.stdout and "7 examples" in result.stdout
    assert max(int(step.name) for step in (tmp_path / "run" / "checkpoints").glob("[0-9]*")) == 6
    measured = command("train.evaluate", "--model", "run/checkpoints", "--data-dir", data_dir, cwd=tmp_path)
    assert measured.returncode == 0, measured.stderr
    assert "7 images of 32 x 32" in measured.stdout
    # The trainer's own last evaluation and this command's say the same.
    (line,) = [line for line in result.stdout.splitlines() if "epoch 2.00: top-1" in line]
    top1, top5 = (float(line.split(f"{name} ")[1].split(" %")[0]) for name in ("top-1", "top-5"))
    assert top5 > 0, "it learnt nothing, so there is nothing to compare"
    (row,) = csv.DictReader((tmp_path / "results-imagenet2012.csv").read_text().splitlines())
    assert (round(float(row["top1"]), 2), round(float(row["top5"]), 2)) == (top1, top5)


def test_slices_and_versions(data_dir):
    for split, size in (("train[:50%]", 6), ("train[75%:]", 3), ("validation[:2]", 2)):
        assert len(open_dataset("imagenet2012", split, data_dir=data_dir)) == size
    assert len(open_dataset("imagenet2012:5.1.0", "train", data_dir=data_dir)) == 12
    with pytest.raises(FileNotFoundError, match="has version 5.1.0, not the one asked for"):
        open_dataset("imagenet2012:5.0.0", "train", data_dir=data_dir)


@pytest.mark.parametrize(
    ("train", "held_out", "common"),
    [
        ("train[:50%]", "train[50%:]", False),
        ("train", "validation", False),
        ("train", "train[90%:]", True),
        ("train[:8]", "train[7:]", True),
        ("train[:4]+train[8:]", "train[4:8]", False),
    ],
)
def test_slices_with_pictures_in_common(data_dir, train, held_out, common):
    config = Config(dataset="imagenet2012", train_split=train, eval_split=held_out, data_dir=str(data_dir))
    with pytest.raises(ValueError, match="on the same pictures") if common else contextlib.nullcontext():
        open_splits(config)


def test_wrong_split(data_dir):
    with pytest.raises(ValueError, match="has no split 'minival'; it has train, validation"):
        open_dataset("imagenet2012", "minival", data_dir=data_dir)


def test_already_prepared_is_left_alone(data_dir, tars, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in data_dir.rglob("*") if path.is_file()}
    result = command("train.prepare", "--manual-dir", tars, "--data-dir", data_dir, cwd=tmp_path)
    assert result.returncode == 0 and "Already there" in result.stdout and "train: 12 pictures" in result.stdout
    assert before == {path: path.stat().st_mtime_ns for path in data_dir.rglob("*") if path.is_file()}


@pytest.fixture
def copy(data_dir, tmp_path):
    shutil.copytree(data_dir / "imagenet2012", tmp_path / "imagenet2012")
    return tmp_path


def shard(folder, split):
    return folder / "imagenet2012" / "5.1.0" / f"imagenet2012-{split}.array_record-00000-of-00001"


def test_a_missing_shard(copy):
    shard(copy, "train").unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of the files of split train: imagenet2012-train.*prepare it"):
        open_dataset("imagenet2012", "train", data_dir=copy)
    assert len(open_dataset("imagenet2012", "validation", data_dir=copy)) == 7


def test_a_damaged_shard_is_no_training_data(copy):
    os.truncate(shard(copy, "train"), shard(copy, "train").stat().st_size // 2)
    dataset = open_dataset("imagenet2012", "train", data_dir=copy)
    batches = train_batches(dataset, size=16, batch_size=4, seed=0)
    with pytest.raises(UnreadablePicture, match="12 pictures in a row cannot be read, from record .*damaged"):
        next(batches)
    batches = eval_batches(dataset, preprocessing=Preprocessing(size=16), batch_size=4)
    with pytest.raises(UnreadablePicture, match="record 0 of imagenet2012.*damaged.*evaluation stops"):
        next(batches)


def test_validation_alone_can_be_prepared(tars, tmp_path):
    (tmp_path / "manual").mkdir()
    shutil.copy(tars / "ILSVRC2012_img_val.tar", tmp_path / "manual")
    arguments = ("--manual-dir", tmp_path / "manual", "--data-dir", tmp_path / "data")
    result = command("train.prepare", *arguments, cwd=tmp_path)
    assert result.returncode == 0 and "no ILSVRC2012_img_train.tar" in result.stdout
    assert "imagenet2012 validation: 7 pictures" in result.stdout and "imagenet2012 train" not in result.stdout
    message = "has no split 'train'; it has validation: its tar was not there. Move or remove .*5.1.0 and prepare it"
    with pytest.raises(ValueError, match=message):
        open_dataset("imagenet2012", "train", data_dir=tmp_path / "data")
    result = command("train.prepare", "--manual-dir", tars, "--data-dir", tmp_path / "data", cwd=tmp_path)
    assert result.returncode == 2 and "Already there" not in result.stdout
    folder = tmp_path / "data/imagenet2012/5.1.0"
    assert f"error: {folder} was prepared without ILSVRC2012_img_train.tar. Move or remove it" in result.stderr


def test_another_format_is_not_prepared_over(copy, tars):
    info = copy / "imagenet2012/5.1.0/dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    for file in info.parent.glob("*.array_record*"):
        file.rename(file.with_name(file.name.replace("array_record", "tfrecord")))
    message = "was prepared as tfrecord, which has no random access. Move or remove it, or give another --data-dir"
    with pytest.raises(ValueError, match=message):
        open_dataset("imagenet2012", "train", data_dir=copy)
    result = command("train.prepare", "--manual-dir", tars, "--data-dir", copy, cwd=copy)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"error: {info.parent} was prepared in another format than array_record. Move or remove it" in result.stderr


def test_a_broken_tar_leaves_nothing(tars, tmp_path):
    (tmp_path / "manual").mkdir()
    shutil.copy(tars / "ILSVRC2012_img_val.tar", tmp_path / "manual")
    whole = (tars / "ILSVRC2012_img_train.tar").read_bytes()
    (tmp_path / "manual" / "ILSVRC2012_img_train.tar").write_bytes(whole[: len(whole) // 2])
    arguments = ("--manual-dir", tmp_path / "manual", "--data-dir", tmp_path / "data")
    result = command("train.prepare", *arguments, cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "is broken: unexpected end of data. Nothing was prepared" in result.stderr
    with pytest.raises(FileNotFoundError, match="no prepared data set"):
        open_dataset("imagenet2012", "train", data_dir=tmp_path / "data")


def test_a_killed_preparation_can_be_done_again(tars, tmp_path):
    arguments = ("--manual-dir", str(tars), "--data-dir", str(tmp_path))
    # It stops where the examples of the second split would be written, for the kill to hit it there.
    program = """
import sys, time
from train import prepare
prepare.os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
from tensorflow_datasets.core import split_builder
build = split_builder.SplitBuilder.submit_split_generation
def hold(self, split_name, *args, **options):
    if split_name == "validation":
        print("half", flush=True)
        time.sleep(600)
    return build(self, split_name, *args, **options)
split_builder.SplitBuilder.submit_split_generation = hold
prepare.run(sys.argv[1:])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert any(line == "half\n" for line in process.stdout)
    process.kill()
    process.wait()
    (leftover,) = (tmp_path / "imagenet2012").iterdir()
    with pytest.raises(FileNotFoundError, match=f"half prepared: {leftover}.*Remove it and prepare again: python -m"):
        open_dataset("imagenet2012", "train", data_dir=tmp_path)
    result = command("train.prepare", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"{leftover} is what an interrupted preparation left; it can be removed." in result.stdout
    assert len(open_dataset("imagenet2012", "train", data_dir=tmp_path)) == 12


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "is built from ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar; say where they are with --manual-dir"),
        (("--manual-dir", "empty"), "there is no ILSVRC2012_img_train.tar or ILSVRC2012_img_val.tar in"),
        (("--manual-dir", "text"), "ILSVRC2012_img_val.tar is not a tar file; was the download complete?"),
        (("--dataset", "imagenet_zzz"), "TFDS knows no data set 'imagenet_zzz'"),
    ],
)
def test_what_cannot_be_prepared(tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "ILSVRC2012_img_val.tar").write_text("<html>sign in</html>")
    result = command("train.prepare", "--data-dir", tmp_path / "data", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: ") and message in result.stderr
    assert "Traceback" not in result.stderr


def test_too_little_space(tars, tmp_path):
    script = """
import collections, shutil, sys
from train.prepare import prepare
shutil.disk_usage = lambda path: collections.namedtuple("usage", "free")(1000)
prepare("imagenet2012", data_dir=sys.argv[1], manual_dir=sys.argv[2])
"""
    result = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "data", tars],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert f"OSError: {tmp_path / 'data'} has 0.0 GB free; the data set needs 0.0 GB" in result.stderr
    assert not list((tmp_path / "data").glob("imagenet2012/*"))
