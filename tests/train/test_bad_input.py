"""What a user or a machine does wrong: one clear message, nothing lost."""

import dataclasses
import math
import os
import subprocess
import sys

import numpy as np
import pytest

import porting.release
import res2net_jax
from train import imagenet
from train.config import RECIPES, Config, parse
from train.data import Augment
from train.pipeline import Batches
from train.report import read_rows
from train.start import load_model

from .conftest import ROOT, arrays, of_pictures, small, steps, train


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


def test_more_steps_than_can_be_counted(tmp_path):
    with pytest.raises(
        ValueError, match="--epochs 99999999 of 22 steps each are more than .*; train for at most 97,61"
    ):
        train(small(tmp_path, epochs=99_999_999))
    assert not (tmp_path / "run").exists()


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
