"""What a user or a machine does wrong: one clear message, nothing lost."""

import dataclasses
import errno
import functools
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import porting.release
import res2net_jax
from train import imagenet
from train.claim import claim
from train.config import RECIPES, Config, parse, to_json
from train.data import Augment
from train.imagenet import main
from train.pipeline import Batches
from train.report import read_rows
from train.same_run import differences, require_same_run
from train.signals import StopRequest
from train.start import load_model

from .conftest import ROOT, arrays, small, steps, train


def command(*arguments, **environment):
    """Exit code and standard error of the command; a traceback in it is a failure."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    command = [sys.executable, "-m", "train.imagenet", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in result.stderr
    return result.returncode, result.stderr


def test_a_failure_keeps_its_exit_code_on_a_full_disk():
    for arguments in (["--drop-rate", "3"], ["--output", "~nobody-of-this-name/run"]):
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-m", "train.imagenet", "digits", *arguments]
            assert subprocess.run(command, cwd=ROOT, stderr=full, timeout=300).returncode == 2


@pytest.mark.parametrize(
    "augment", [{"color_jitter": math.nan}, {"color_jitter": math.inf}, {"crop_ratio": (1.0, math.inf)}]
)
def test_augmentation_is_finite(augment):
    with pytest.raises(ValueError, match="--color-jitter must be|--crop-ratio must be"):
        Augment(**augment)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, "--epochs must be greater than 0; got 0"),
        ("ema", 1.5, "--ema must be above 0 and at most 1; got 1.5"),
        ("warmup_epochs", 30.0, "--warmup-epochs 30.0 leaves none of the 30 epochs; .* --warmup-epochs 0"),
        ("accumulate", 3, "--batch-size 64 cannot be cut into 3 equal parts"),
        ("batchnorm_group", 48, "--batchnorm-group 48 does not divide the 64 images"),
        ("seed", 5_000_000_000, "--seed must be from 0 to 4294967295; got 5000000000"),
        ("epochs", 99_999_999_999, "--epochs must be at most 2147483647; got 99999999999"),
        ("decay_epochs", 99_999_999_999, "--decay-epochs must be at most 2147483647; got 99999999999"),
    ],
)
def test_contradictions(capsys, field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RECIPES["digits"](), **{field: value})
    with pytest.raises(SystemExit) as exit:
        parse(["digits", f"--{field.replace('_', '-')}", str(value)], "train")
    assert exit.value.code == 2
    assert f"--{field.replace('_', '-')}" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_takes_both_forms_of_a_switch(recipe):
    switches = [field.name for field in dataclasses.fields(Config) if field.type is bool]
    assert {"pretrained", "decay_all"} <= {*switches}
    for switch in switches:
        name = switch.replace("_", "-")
        assert getattr(parse([recipe, f"--{name}"], "train"), switch) is True
        assert getattr(parse([recipe, f"--no-{name}"], "train"), switch) is False


def test_a_misspelt_recipe():
    with pytest.raises(ValueError, match='there is no recipe "digit"; did you mean "digits"?'):
        parse(["digit"], "train")
    with pytest.raises(ValueError, match='there is no recipe "x"; there are paper, cosine, v1b, finetune, digits'):
        parse(["x"], "train")


def test_the_command_line_ends_with_2_and_one_line():
    code, err = command("digits", "--dataset", "folder:/nowhere")
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("error: --dataset folder:/nowhere: there is no folder")
    code, err = command("digits", "--btach-size", 32)
    assert code == 2
    assert "--batch-size" in err


def test_a_batch_that_does_not_divide_by_the_devices(tmp_path):
    flags = "--xla_force_host_platform_device_count=8"
    code, err = command("digits", "--batch-size", 36, "--output", tmp_path / "run", XLA_FLAGS=flags)
    assert code == 2
    assert "--batch-size 36 cannot be spread evenly over 8 devices; the nearest that can are 32 and 40" in err
    assert not (tmp_path / "run").exists()


def test_more_processes_than_were_described(tmp_path):
    code, err = command("digits", "--coordinator", "localhost:1", "--output", tmp_path / "run")
    assert code == 2
    assert "--coordinator, --num-processes and --process-id go together" in err


def test_the_same_pictures_for_training_and_evaluation(tmp_path):
    message = "trained and evaluated on the same pictures.*--train-split train --eval-split test"
    with pytest.raises(ValueError, match=message):
        train(small(tmp_path, eval_split="train"))


def test_a_resume_with_another_config_names_what_differs(tmp_path):
    assert train(small(tmp_path)) == 0
    before = arrays(tmp_path / "run")
    changed = small(tmp_path, momentum=0.8, channels=(16,), layers=(2,), log_every=3)
    changed = dataclasses.replace(changed, augment=dataclasses.replace(changed.augment, flip=0.5))
    with pytest.raises(ValueError) as caught:
        train(changed)
    first, *lines = str(caught.value).splitlines()
    assert "holds a run with another config; give another --output" in first
    assert sorted(line.split(":")[0].strip() for line in lines) == ["channels", "flip", "layers", "momentum"]
    assert "  momentum: the run has 0.9, this command 0.8" in lines
    after = arrays(tmp_path / "run")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    with pytest.raises(ValueError, match="To train its weights further: --pretrained --model .*run --output ANOTHER:"):
        train(small(tmp_path, epochs=99))


def test_a_run_that_is_older_than_a_switch_goes_on():
    config = RECIPES["digits"]()
    saved = to_json(config)
    del saved["augment"]["resizer"], saved["drop_rate"]
    assert differences(saved, config) == []
    changed = dataclasses.replace(config, augment=dataclasses.replace(config.augment, resizer="simd"))
    assert differences(saved, changed) == ["resizer: the run has 'pillow', this command 'simd'"]


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


def test_more_steps_than_can_be_counted(tmp_path):
    with pytest.raises(
        ValueError, match="--epochs 99999999 of 22 steps each are more than .*; train for at most 97,61"
    ):
        train(small(tmp_path, epochs=99_999_999))
    assert not (tmp_path / "run").exists()


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


@pytest.fixture
def pictures(tmp_path):
    """``train`` and ``val`` of two classes of eight and two pictures."""
    for split, count in (("train", 8), ("val", 2)):
        for label in "ab":
            (tmp_path / "pictures" / split / label).mkdir(parents=True)
            for i in range(count):
                picture = Image.new("RGB", (24, 24), (i * 20, 90 * (label == "a"), len(split)))
                picture.save(tmp_path / "pictures" / split / label / f"{i}.png")
    return tmp_path / "pictures"


def of_pictures(tmp_path, pictures, **changes):
    return small(tmp_path, dataset=f"folder:{pictures}", batch_size=4, **changes)


def test_a_resume_on_other_data_is_refused_and_leaves_the_checkpoints_alone(tmp_path, pictures):
    config = of_pictures(tmp_path, pictures)
    assert train(config) == 0
    before = arrays(tmp_path / "run")
    longer = dataclasses.replace(config, steps=4)

    def refused():
        with pytest.raises(ValueError, match="of the same config, but on other data or from other weights") as caught:
            train(longer)
        after = arrays(tmp_path / "run")
        assert steps(tmp_path / "run") == [2] and all(np.array_equal(before[name], after[name]) for name in before)
        return [line.strip() for line in str(caught.value).splitlines()[1:]]

    shutil.copy(pictures / "train/a/0.png", pictures / "train/a/more.png")
    assert refused() == ["examples: the run has 16, now there is 17"]
    (pictures / "train/a/more.png").rename(pictures / "train/a/0.png")
    (pictures / "train/a/1.png").rename(pictures / "train/a/9.png")
    assert [line.partition(":")[0] for line in refused()] == ["checksum of the pictures to learn from"]
    (pictures / "train/a/9.png").rename(pictures / "train/a/1.png")
    for split in ("train", "val"):
        (pictures / split / "b").rename(pictures / split / "d")
    assert refused() == ["class_names: the run has ['a', 'b'], now there is ['a', 'd']"]
    for split in ("train", "val"):
        shutil.copytree(pictures / split / "d", pictures / split / "b")
    assert refused()[0] == "num_classes: the run has 2, now there is 3"
    for split in ("train", "val"):
        shutil.rmtree(pictures / split / "d")
    assert train(longer) == 0
    pictures.rename(tmp_path / "moved")
    assert train(of_pictures(tmp_path, tmp_path / "moved", steps=6)) == 0 and max(steps(tmp_path / "run")) == 6
    shutil.copytree(tmp_path / "moved", pictures)
    Image.new("RGB", (99, 99)).save(pictures / "val/a/0.png")  # of the same name
    for other in (pictures, tmp_path / "third"):
        with pytest.raises(ValueError, match="with another config; .*\n  dataset: the run has 'folder:.*moved'"):
            train(of_pictures(tmp_path, other, steps=8))
        shutil.copytree(tmp_path / "moved", tmp_path / "third", dirs_exist_ok=True)
        (tmp_path / "third/val/a/0.png").unlink()
    (tmp_path / "moved/val/a/0.png").unlink()  # which was broken, say
    assert train(of_pictures(tmp_path, tmp_path / "moved", steps=8)) == 0


def test_a_folder_is_another_one_to_a_run_that_did_not_keep_the_sizes_of_its_pictures(tmp_path, pictures):
    run = {"config": of_pictures(tmp_path, tmp_path / "moved"), "examples": 16, "checksums": {}}
    saved = {
        "train": {"config": to_json(of_pictures(tmp_path, pictures)), "checksums": {"checksum of the pictures": 1}}
    }
    with pytest.raises(ValueError, match="with another config; .*\n  dataset: the run has 'folder:.*pictures'"):
        require_same_run(saved, {}, run, tmp_path)


def test_a_picture_to_evaluate_on_that_cannot_be_read_costs_nothing_but_the_evaluation(tmp_path, pictures):
    config = of_pictures(tmp_path, pictures, steps=4)
    bad = pictures / "val/b/1.png"
    good = bad.read_bytes()
    bad.write_text("<html>404</html>")
    with pytest.raises(ValueError, match="val/b/1.png cannot be read.*the evaluation stops"):
        train(config)
    assert steps(tmp_path / "run") == [4]
    bad.write_bytes(good)
    assert train(config) == 0
    (row,) = [row for row in read_rows(tmp_path / "run" / "metrics.csv") if row["val_count"]]
    assert (row["step"], row["val_count"]) == ("4", "4")


def test_an_evaluation_without_memory_costs_nothing_but_itself(tmp_path, pictures, monkeypatch):
    def eval_batches(*arguments, **options):
        raise MemoryError("too little")

    monkeypatch.setattr(imagenet, "eval_batches", eval_batches)
    with pytest.raises(MemoryError, match="too little"):
        train(of_pictures(tmp_path, pictures, steps=4))
    assert steps(tmp_path / "run") == [4]


@pytest.mark.parametrize("failure", [OSError, MemoryError])
def test_data_that_go_away_leave_what_was_learnt(tmp_path, pictures, monkeypatch, failure):
    config = of_pictures(tmp_path, pictures, steps=4)
    assert train(dataclasses.replace(config, output=str(tmp_path / "undisturbed"))) == 0
    following = Batches.__next__

    def __next__(self):
        if self.get_state()["step"] == 3:
            raise failure("unplugged")
        return following(self)

    monkeypatch.setattr(Batches, "__next__", __next__)
    with pytest.raises(failure, match="unplugged"):
        train(config)
    assert steps(tmp_path / "run") == [3]
    monkeypatch.undo()
    assert train(config) == 0
    expected, found = arrays(tmp_path / "undisturbed"), arrays(tmp_path / "run")
    assert [name for name in expected if not np.array_equal(expected[name], found[name])] == []


def test_weights_that_do_not_fit_the_model(tmp_path):
    res2net_jax.save(res2net_jax.create("res2net50_26w_4s", layers=(1,), channels=(8,), scale=2), tmp_path / "model")
    with pytest.raises(ValueError, match="do not fit the model asked for"):
        train(small(tmp_path, pretrained=True, model=str(tmp_path / "model"), channels=(16,)))


def test_trained_weights_without_pretrained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    res2net_jax.save(res2net_jax.create("res2net50_26w_4s", layers=(1,), channels=(8,), scale=2), "tiny")
    for model in ("tiny", "hf://user/tiny"):
        with pytest.raises(ValueError, match=f"--model {model} holds trained weights; add --pretrained"):
            train(small(tmp_path, model=model))


def test_weights_that_cannot_be_downloaded(monkeypatch, tmp_path):
    """Neither training nor evaluation has the option that the library names."""
    advice = "For this command port it first: python -m porting {} --source FILE --output DIR, then --model DIR"

    def fetch(*_, **__):
        raise ConnectionError("cannot download it (no network); check the network, or give the file as source=")

    monkeypatch.setattr(porting.release, "fetch", fetch)
    monkeypatch.setenv("RES2NET_JAX_HOME", str(tmp_path))
    with pytest.raises(ConnectionError, match="no network") as caught:
        load_model("res2net50_14w_8s")
    assert str(caught.value).endswith(advice.format("res2net50_14w_8s"))
    (tmp_path / "w.pth").touch()
    with pytest.raises(ValueError, match="w.pth is a file; weights in a file go with the name") as caught:
        load_model(str(tmp_path / "w.pth"))
    assert str(caught.value).endswith(advice.format("NAME"))


def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_good(tmp_path, capsys):
    config = small(tmp_path, steps=60, lr=1e6, schedule="steps", warmup_epochs=2, checkpoint_every=1, keep=100)
    assert train(config) == 3
    err = capsys.readouterr().err
    bad = int(err.split("error: step ")[1].split(":")[0])
    assert steps(tmp_path / "run")[-1] == bad - 1 > 1
    assert all(np.isfinite(value).all() for value in arrays(tmp_path / "run").values())
    res2net_jax.load(tmp_path / "run" / "checkpoints")
