"""The evaluation: the figure itself against timm, the same on any devices and processes, and what is printed."""

import csv
import dataclasses
import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import res2net_jax
from res2net_jax.checkpoint import arrays
from res2net_jax.metadata import describe
from res2net_jax.variants import Preprocessing, get_variant
from train.data import eval_batches
from train.datasets import Dataset, imagenet_synsets, open_dataset
from train.evaluate import COLUMNS, evaluate, require_matching, require_table
from train.start import load_model, preprocessing_of

from .conftest import XLA_FLAGS, free_port

ROOT = Path(__file__).parents[2]
SMALL = {"layers": (1, 1), "channels": (16, 32)}


def small(num_classes=10, in_chans=1, **options):
    return res2net_jax.create("res2net50_26w_4s", num_classes=num_classes, in_chans=in_chans, **SMALL, **options)


def run(*arguments, cwd, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "train.evaluate", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


SETTING = Preprocessing(size=16, crop_pct=1.0, interpolation="bicubic", mean=(0.3,), std=(0.35,))


def digits_pixels(dataset):
    """The evaluation transform of SETTING, written out."""
    pictures = [Image.fromarray(dataset.source[i]["image"][:, :, 0]) for i in range(len(dataset))]
    grey = [np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC)) for picture in pictures]
    return (np.stack(grey)[..., None] / np.float32(255) - np.float32(0.3)) / np.float32(0.35)


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory):
    """A model of the digits, with the setting that it is for beside its arrays."""
    from orbax.checkpoint import v1 as ocp

    model = small().eval()
    # A fresh model answers the same class always; less its mean answer, its answers depend on the picture.
    mean = model(digits_pixels(open_dataset("digits", "test"))).mean(axis=0)
    model.fc.bias.set_value(model.fc.bias.get_value() - mean)
    folder = tmp_path_factory.mktemp("model") / "7"
    metadata = {**describe(model), "preprocessing": dataclasses.asdict(SETTING)}
    ocp.save_checkpointables(folder, {"model": arrays(model)}, custom_metadata=metadata)
    return folder


def expected_counts(folder):
    """Straight from the definition: one picture after the other."""
    dataset = open_dataset("digits", "test")
    model, pixels = res2net_jax.load(folder), digits_pixels(dataset)
    ranks, answers = [], set()
    for i in range(len(dataset)):
        logits = np.asarray(model(pixels[i : i + 1]))[0]
        ranks.append(int((logits > logits[dataset.source[i]["label"]]).sum()))
        answers.add(int(logits.argmax()))
    assert len(answers) > 5
    return {"top1": sum(rank < 1 for rank in ranks), "top5": sum(rank < 5 for rank in ranks), "count": len(dataset)}


@pytest.fixture(scope="module")
def expected(digits_folder):
    return expected_counts(digits_folder)


@pytest.mark.parametrize("batch_size", [64, 1000])
def test_counts_are_those_of_one_picture_after_the_other(digits_folder, expected, batch_size):
    model, dataset = res2net_jax.load(digits_folder).train(), open_dataset("digits", "test")
    assert preprocessing_of(model) == SETTING
    assert evaluate(model, dataset, SETTING, batch_size=batch_size) == expected
    assert not model.bn1.use_running_average  # still in train mode
    assert 0 < expected["top1"] < expected["top5"] < 355


def accuracies(expected):
    return {key: f"{100 * expected[key] / expected['count']:.3f}" for key in ("top1", "top5")}


def test_eight_devices_count_as_one(digits_folder, expected, tmp_path):
    arguments = ("--model", digits_folder, "--dataset", "digits", "--batch-size", 104)
    flags = f"--xla_force_host_platform_device_count=8 {XLA_FLAGS}"
    code, out, err = finish(run(*arguments, cwd=tmp_path, XLA_FLAGS=flags))
    assert code == 0, err
    assert f"{digits_folder} on digits, split test: 355 images of 16 x 16 (crop 1, bicubic)" in out
    (row,) = csv.DictReader((tmp_path / "results-digits.csv").read_text().splitlines())
    assert {key: row[key] for key in ("top1", "top5")} == accuracies(expected)
    code, _, err = finish(run(*arguments[:-1], 100, cwd=tmp_path, XLA_FLAGS=flags))
    assert code == 2 and err == "error: a batch of 100 cannot be divided evenly over 8 devices\n"


def two_processes(*arguments, cwd, second=(), apart=False):
    together = ("--coordinator", f"localhost:{free_port()}", "--num-processes", 2)
    flags = f"--xla_force_host_platform_device_count=2 {XLA_FLAGS}"
    own, folders = [(), second], [cwd / str(i) if apart else cwd for i in range(2)]
    running = [
        run(*arguments, *together, "--process-id", i, *own[i], cwd=folders[i], XLA_FLAGS=flags) for i in range(2)
    ]
    return [finish(process) for process in running]


def test_two_processes_of_two_devices_count_as_one(digits_folder, expected, tmp_path):
    (code, out, err), (other, silent, err_other) = two_processes(
        *("--model", digits_folder, "--dataset", "digits", "--batch-size", 48, "--workers", 1), cwd=tmp_path
    )
    assert (code, other) == (0, 0), err + err_other
    assert "355 images" in out and "measured" not in silent
    (row,) = csv.DictReader((tmp_path / "results-digits.csv").read_text().splitlines())
    assert {key: row[key] for key in ("top1", "top5")} == accuracies(expected)


def test_two_processes_that_do_not_agree_measure_nothing(digits_folder, tmp_path):
    arguments = ("--model", digits_folder, "--dataset", "digits", "--batch-size", 48)
    results = two_processes(
        *arguments, cwd=tmp_path, second=("--model", tmp_path / "other", "--size", 32, "--split", "train")
    )
    for code, _, err in results:
        assert code == 2 and "error: the processes of this run do not agree" in err, err
        differing = [line.partition(":")[0].strip() for line in err.partition("same data:")[2].splitlines()[1:]]
        assert differing == ["model", "split", "size", "pictures to evaluate on"]
    assert not list(tmp_path.glob("*.csv"))


def test_two_processes_with_other_weights_at_the_same_place(digits_folder, tmp_path):
    model = res2net_jax.load(digits_folder)
    for process in range(2):
        (tmp_path / str(process)).mkdir()
        model.fc.bias[...] += process
        res2net_jax.save(model, tmp_path / str(process) / "model")
    # Each in a folder of its own, as on hosts with disks of their own.
    results = two_processes("--model", "./model", "--dataset", "digits", "--batch-size", 48, cwd=tmp_path, apart=True)
    for code, _, err in results:
        assert code == 2 and re.search(r"error: the processes .* do not agree.*:\n  weights: here \d+\n", err), err


def test_the_newest_checkpoint_is_that_of_process_0(digits_folder, tmp_path, monkeypatch):
    for step in ("7", "8"):
        shutil.copytree(digits_folder, tmp_path / step)
    loaded = []
    monkeypatch.setattr(res2net_jax, "load", lambda name: loaded.append(name))
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("train.devices.together", lambda action: action())
    monkeypatch.setattr("train.devices.of_the_first", lambda steps: [7])
    load_model(str(tmp_path))
    assert loaded == [tmp_path / "7"]


def test_each_process_has_the_weights_before_they_are_read_together(tmp_path, monkeypatch):
    loaded, home = [], {}
    monkeypatch.setattr(res2net_jax, "load", lambda name: loaded.append(name))
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("train.devices.together", lambda action: action())
    monkeypatch.setattr("train.devices.of_the_first", lambda numbers: numbers)
    monkeypatch.setattr("res2net_jax.hub.cached", lambda name: home[name])
    with pytest.raises(KeyError):
        load_model("res2net50_26w_4s")
    assert not loaded
    home["res2net50_26w_4s"] = tmp_path
    load_model("res2net50_26w_4s")
    assert loaded == [tmp_path]


def test_accuracy_is_that_of_timm(timm_model, photos, checkpoint_folder, tmp_path):
    """Real photographs in ImageNet's folders; half of them where timm puts them, the others elsewhere."""
    import timm.data
    import torch

    reference = timm_model("res2net50_48w_2s")
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=reference))
    synsets = list(imagenet_synsets())
    expected = {"top1": 0, "top5": 0, "count": 0}
    for i, place in enumerate((0, 0, 3, 4, 5, 999)):
        left, top = 40 * i, 20 * i
        crop = Image.open(photos[i % 2]).convert("RGB").crop((left, top, left + 300, top + 280 + i))
        crop.save(tmp_path / "picture.png")
        with torch.no_grad():
            logits = reference(transform(Image.open(tmp_path / "picture.png").convert("RGB"))[None])[0]
        label = int(torch.argsort(logits, descending=True)[place])
        (tmp_path / "set" / synsets[label]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "picture.png").rename(tmp_path / "set" / synsets[label] / f"{i}.png")
        expected = {
            "top1": expected["top1"] + (place < 1),
            "top5": expected["top5"] + (place < 5),
            "count": expected["count"] + 1,
        }
    dataset = open_dataset(f"folder:{tmp_path / 'set'}", "validation")
    model = res2net_jax.load(checkpoint_folder)
    setting = preprocessing_of(model)
    assert setting == get_variant("res2net50_48w_2s").preprocessing
    assert evaluate(model, dataset, setting, batch_size=4) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="has no /proc")
def test_a_table_that_cannot_be_written_is_told_before_the_evaluation(tmp_path):
    with pytest.raises(OSError):
        require_table(Path("/proc/results.csv"))
    require_table(tmp_path / "results.csv")
    assert not list(tmp_path.iterdir())


def test_what_is_no_table_is_told_in_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0" * 999)
    with pytest.raises(ValueError, match="--csv .*photo.jpg is another kind of table"):
        require_table(tmp_path / "photo.jpg")
    with pytest.raises(IsADirectoryError, match="^--csv .* is a folder; name a file, such as .*results.csv$"):
        require_table(tmp_path)

    def refuse(**_):
        raise PermissionError(errno.EACCES, "Permission denied", "/tmp/tmpx1y2")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(PermissionError, match="cannot write .*/x.csv .Permission denied.") as caught:
        require_table(tmp_path / "x.csv")
    assert "tmpx1y2" not in str(caught.value)


def test_row_and_summary_of_a_whole_model(checkpoint_folder, tmp_path):
    synsets = list(imagenet_synsets())
    for label in (3, 8):
        (tmp_path / "set" / synsets[label]).mkdir(parents=True)
        Image.new("RGB", (30, 20), (label, 0, 0)).save(tmp_path / "set" / synsets[label] / "x.png")
    table = tmp_path / "results.csv"
    for _ in range(2):
        arguments = ("--model", checkpoint_folder, "--dataset", f"folder:{tmp_path / 'set'}", "--csv", table)
        code, out, err = finish(run(*arguments, "--batch-size", 2, cwd=tmp_path))
        assert code == 0, err
    assert re.search(r"measured +\d+\.\d{3} +\d+\.\d{3}\nAdded to ", out), "two pictures are not ImageNet"
    setting = ("--size", 32, "--crop-pct", 1, "--csv", tmp_path / "other.csv")
    code, out, err = finish(run(*arguments, "--batch-size", 2, *setting, cwd=tmp_path))
    assert code == 0 and "2 images of 32 x 32 (crop 1, bilinear)" in out, err
    assert (tmp_path / "other.csv").read_text().endswith(",25.29,32,1,bilinear\n")
    lines = table.read_text().splitlines()
    assert lines[0] == "model,top1,top1_err,top5,top5_err,param_count,img_size,crop_pct,interpolation"
    assert lines[1] == lines[2] and len(lines) == 3
    row = dict(zip(COLUMNS, lines[1].split(","), strict=True))
    # As in timm's results-imagenet.csv: res2net50_48w_2s,...,25.29,224,0.875,bilinear
    assert lines[1].endswith(",25.29,224,0.875,bilinear")
    assert float(row["top1"]) + float(row["top1_err"]) == pytest.approx(100)
    assert float(row["top5"]) + float(row["top5_err"]) == pytest.approx(100)


# What is wrong


def test_model_and_data_must_match():
    digits = open_dataset("digits", "test")
    with pytest.raises(ValueError, match="the model has 1000 classes and digits has 10"):
        require_matching(small(1000), digits)
    with pytest.raises(ValueError, match="the model takes 3 channels and digits has 1"):
        require_matching(small(10, 3), digits)
    model = small()
    model.class_names = ("0", "1", "3", "2", *"456789")
    with pytest.raises(ValueError, match="class 2 is '3' in the model and '2' in the data set"):
        require_matching(model, digits)
    model.class_names = tuple("0123456789")
    require_matching(model, digits)


@pytest.fixture
def with_a_bad_picture(tmp_path):
    """Arguments for a set of which one process of two, or one of one, cannot read a picture."""
    for label in "ab":
        (tmp_path / "set" / label).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (30, 20)).save(tmp_path / "set" / label / f"{i}.png")
    (tmp_path / "set" / "b" / "bad.jpg").write_text("<html>")
    model = res2net_jax.save(small(2, 3), tmp_path / "model")
    return "--model", model, "--dataset", f"folder:{tmp_path / 'set'}", "--batch-size", 4


def test_an_unreadable_picture_stops_all_processes(with_a_bad_picture, tmp_path):
    results = two_processes(*with_a_bad_picture, cwd=tmp_path)
    assert [code for code, _, _ in results] == [2, 2]
    errors = sorted(line for _, _, err in results for line in err.splitlines() if line.startswith("error: "))
    assert len(errors) == 2 and "bad.jpg cannot be read" in errors[0]
    assert errors[1] == "error: another process has failed and says why; this one has stopped with it"
    assert not list(tmp_path.glob("*.csv"))


def test_an_unreadable_picture_stops_it(with_a_bad_picture, tmp_path):
    code, out, err = finish(run(*with_a_bad_picture, cwd=tmp_path))
    assert code == 2 and out == "" and err.startswith("error: ") and len(err.splitlines()) == 1
    assert "bad.jpg cannot be read" in err and "the evaluation stops" in err
    assert not list(tmp_path.glob("*.csv"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--model", "res2net50_27w_4s", "--dataset", "digits"), "did you mean res2net50_26w_4s"),
        (("--model", "./nowhere", "--dataset", "digits"), "there is no folder"),
        (("--model", "res2net50_26w_4s", "--data-dir", "none"), "no prepared data set 'imagenet2012' in none"),
        (("--model", "x", "--dataset", "digits", "--size", "0"), "--size must be at least 1"),
        (("--model", "x", "--dataset", "digits", "--crop-pct", "0"), "--crop-pct above 0 and at most 1"),
        (("--model", "x", "--dataset", "digits", "--batch-size", "0"), "--batch-size must be at least 1; got 0"),
        (("--model", "x", "--dataset", "digits", "--csv", "other.csv"), "other.csv is another kind of table"),
        (("--model", "x", "--dataset", "digits", "--csv", "no/such.csv"), "there is no folder"),
        (("--model", "x", "--dataset", "digits", "--split", "val"), "digits has no split 'val'; it has train, test"),
        (("--model", "x", "--dataset", "digits", "--process-id", "1"), "give all three or none"),
    ],
)
def test_mistakes_are_explained_in_one_line(tmp_path, arguments, message):
    (tmp_path / "other.csv").write_text("name,price\n")
    code, out, err = finish(run(*arguments, cwd=tmp_path))
    assert code == 2 and out == ""
    assert err.startswith("error: ") and message in err and len(err.splitlines()) == 1
    assert (tmp_path / "other.csv").read_text() == "name,price\n"


def test_no_labels_at_all(digits_folder):
    class Source:
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return {"image": np.zeros((8, 8, 1), np.uint8), "label": ()}

    dataset = Dataset("unlabelled", "validation", Source(), 10, multi_label=True, in_chans=1)
    model = res2net_jax.load(digits_folder)
    setting = preprocessing_of(model)
    with pytest.raises(ValueError, match=r"no example of unlabelled\[validation\] has a label"):
        evaluate(model, dataset, setting, batch_size=2)
    assert len(list(eval_batches(dataset, preprocessing=setting, batch_size=2))) == 2


def test_grey_images_have_the_average_of_the_constants():
    setting = preprocessing_of(res2net_jax.create("res2net50_26w_4s", in_chans=2, layers=(1,), channels=(8,)))
    np.testing.assert_allclose([setting.mean, setting.std], [[0.449] * 2, [0.226] * 2], rtol=1e-12)
