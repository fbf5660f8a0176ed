"""From a folder of pictures to a model that speaks of its classes."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import res2net_jax
from train import imagenet
from train.config import RECIPES, Config, parse
from train.data import Augment
from train.datasets import Dataset
from train.report import read_rows
from train.start import build_model

from .conftest import ROOT, arrays, train

NAMES = ("five", "six $ and $", "sieben für sich", "八", "nine ☂")
#: Extension and mode of what a folder may hold side by side.
FORMATS = [("png", "RGB"), ("jpg", "L"), ("webp", "RGB"), ("gif", "P"), ("bmp", "L"), ("tif", "RGBA"), ("JPEG", "CMYK")]
SMALL = {
    "size": 32,
    "batch_size": 64,
    "augment": Augment(crop_scale=(0.7, 1.0), flip=0.0),
    "eval_crop_pct": 1.0,
    "checkpoint_every": 1000,
    "keep": 1,
}


def write_pictures(folder, digits, names):
    """``folder/{train,val}/NAME/picture N.EXTENSION`` of scikit-learn's digits, each fifth for ``val``."""
    data = load_digits()
    for digit, name in zip(digits, names):
        for number, index in enumerate(np.flatnonzero(data.target == digit)):
            extension, mode = FORMATS[number % len(FORMATS)]
            file = folder / ("val" if number % 5 == 4 else "train") / name / f"picture {index}.{extension}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((data.images[index] * 15.9).astype(np.uint8)).resize((24, 24)).convert(mode).save(file)
    return folder


def trained(config):
    assert train(config) == 0
    return Path(config.output)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A small model that knows the digits 0 to 4."""
    folder = tmp_path_factory.mktemp("pretrained")
    pictures = write_pictures(folder / "pictures", range(5), "01234")
    config = dataclasses.replace(
        RECIPES["digits"](), dataset=f"folder:{pictures}", epochs=8, ema=None, output=str(folder / "run"), **SMALL
    )
    return trained(config) / "checkpoints"


def finetune(pretrained, pictures, output, **changes):
    return dataclasses.replace(
        RECIPES["finetune"](),
        model=str(pretrained),
        dataset=f"folder:{pictures}",
        output=str(output),
        **SMALL,
        **changes,
    )


def python(*arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    command = [sys.executable, "-m", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_from_a_folder_to_the_name_of_a_picture(pretrained, tmp_path):
    pictures = write_pictures(tmp_path / "my pictures", range(5, 10), NAMES)
    run = tmp_path / "run"
    switches = ["--size", 32, "--batch-size", 64, "--epochs", 8, "--lr", 0.4, "--eval-crop-pct", 1, "--flip", 0]
    switches += ["--crop-scale", 0.7, 1, "--model", pretrained, "--dataset", f"folder:{pictures}", "--output", run]
    python("train.imagenet", "finetune", *switches)
    accuracy = float(read_rows(run / "metrics.csv")[-1]["val_top1"])
    assert accuracy > 80, "chance is 20"
    for name in ("confusion.png", "mistakes.png"):
        with Image.open(run / name) as picture:
            assert min(picture.size) > 100

    model = res2net_jax.load(run / "checkpoints")
    assert model.class_names == tuple(sorted(NAMES))
    assert (model.preprocessing.size, model.preprocessing.crop_pct) == (32, 1.0)
    held_out = sorted((pictures / "val").rglob("picture*"))
    answers = python("res2net_jax", "predict", run / "checkpoints", *held_out, "--top-k", 1).splitlines()
    assert answers[::2] == list(map(str, held_out))
    right = [answer.strip().split("%  ")[1] == file.parent.name for answer, file in zip(answers[1::2], held_out)]
    assert 100 * np.mean(right) == pytest.approx(accuracy, abs=1e-3)


def test_the_answers_are_those_of_the_data_sets_pictures(pretrained, tmp_path, monkeypatch):
    pictures = write_pictures(tmp_path / "pictures", range(5, 10), NAMES)
    seen = []
    monkeypatch.setattr(imagenet, "draw_mistakes", lambda *arguments: seen.append(arguments))
    config = finetune(pretrained, pictures, tmp_path / "run", epochs=2, eval_batch_size=50)
    run = trained(config)
    ((folder, dataset, model, answers),) = seen
    assert folder == run and model.class_names == tuple(sorted(NAMES))
    files = [dataset.source.name(i) for i in range(len(dataset))]
    expected = res2net_jax.inference.classify(res2net_jax.load(run / "checkpoints"), files, top_k=1)
    assert len(files) % 50 and {len(column) for column in answers.values()} == {len(files)}
    assert answers["prediction"].tolist() == [prediction.index for (prediction,) in expected]
    np.testing.assert_allclose(
        answers["probability"], [prediction.probability for (prediction,) in expected], rtol=1e-4
    )
    names = [model.class_names[label] for label in answers["label"]]
    assert names == [Path(file).parent.name for file in files]


@pytest.mark.parametrize(
    "more", [{}, {"ema": 0.9, "accumulate": 2, "remat": True, "clip_norm": 1.0}], ids=["plain", "more"]
)
def test_a_frozen_backbone_stays_as_it_is_bit_for_bit(pretrained, tmp_path, more):
    pictures = write_pictures(tmp_path / "pictures", range(5, 9), NAMES)
    config = finetune(pretrained, pictures, tmp_path / "run", epochs=3, freeze="backbone", lr=0.4, **more)
    before = res2net_jax.init.variables(res2net_jax.load(pretrained, num_classes=4))
    saved = arrays(trained(config))
    for prefix in ("model/", "training/raw.") if more else ("model/",):
        for path, leaf in before.items():
            same = np.array_equal(np.asarray(leaf.get_value()), saved[prefix + path])
            assert same == (not path.startswith("fc.")), path
    momentum = [name for name in saved if name.startswith("training/momentum")]
    assert sorted(name.split("'")[-2] for name in momentum) == ["fc.bias", "fc.kernel"]
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.csv") if row["val_loss"]]
    assert float(rows[-1]["val_loss"]) < float(rows[0]["val_loss"])


def test_a_frozen_backbone_is_used_as_in_evaluation(pretrained):
    """The loss of a training step is that of the model in eval mode, label smoothing aside."""
    from train.step import init_state, make_eval_step, make_train_step, zero_sums

    config = dataclasses.replace(RECIPES["finetune"](), freeze="backbone", label_smoothing=0.0, batch_size=16)
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 256, (16, 32, 32, 3), np.uint8), "label": rng.integers(0, 5, 16).astype(np.int32)}
    batch |= {"stop": np.zeros(1, np.int32), "mask": np.ones(16, bool)}
    model = res2net_jax.load(pretrained)
    state = init_state(model, config)
    _, metrics = jax.jit(make_train_step(model, config, 10, (0.5,) * 3, (0.25,) * 3))(state, batch)
    weights = {**state["params"], **state["stats"]}
    sums, _ = jax.jit(make_eval_step(model, config, (0.5,) * 3, (0.25,) * 3))(weights, batch, zero_sums(config))
    assert float(metrics["loss"]) == pytest.approx(float(sums["loss"]) / 16, rel=1e-5)


def test_the_classifier_is_kept_for_the_same_classes_alone(pretrained, tmp_path):
    def classifier(names, seed):
        dataset = Dataset("set", "train", [], len(names), class_names=names)
        model = build_model(finetune(pretrained, tmp_path, tmp_path, seed=seed), dataset)
        assert model.class_names == names
        return np.asarray(model.fc.kernel[...])

    trained = np.asarray(res2net_jax.load(pretrained).fc.kernel[...])
    assert np.array_equal(classifier(tuple("01234"), seed=1), trained)
    other = classifier(tuple("56789"), seed=1)
    assert other.shape == trained.shape and np.abs(other).max() <= trained.shape[0] ** -0.5
    assert not np.array_equal(other, classifier(tuple("56789"), seed=2))


def test_a_resume_from_other_weights_is_refused_and_one_whose_weights_are_gone_goes_on(pretrained, tmp_path):
    pictures, weights = write_pictures(tmp_path / "pictures", range(5), "01234"), tmp_path / "weights"
    model = res2net_jax.load(pretrained)
    res2net_jax.save(model, weights)
    begun = finetune(weights, pictures, tmp_path / "run", epochs=2, steps=2)
    begun = dataclasses.replace(begun, checkpoint_every=1, keep=2)
    longer = dataclasses.replace(begun, steps=4)
    undisturbed = dataclasses.replace(longer, output=str(tmp_path / "undisturbed"))
    trained(begun)
    expected = arrays(trained(undisturbed))
    model.bn1.scale[...] += 1
    res2net_jax.save(model, weights, overwrite=True)
    with pytest.raises(ValueError, match="from other weights; put.*\n  checksum of the weights to start from"):
        train(longer)
    weights.rename(tmp_path / "elsewhere")
    weights.mkdir()  # and nothing in it
    newest = [file for file in (tmp_path / "run/checkpoints/2/model").rglob("*") if file.is_file()]
    max(newest, key=lambda file: file.stat().st_size).write_bytes(b"damaged")
    (tmp_path / "run/checkpoints/1").rename(tmp_path / "run/checkpoints/1.old")  # as of a run killed while it saved
    found = arrays(trained(longer))
    assert [name for name in expected if not np.array_equal(expected[name], found[name])] == []
    assert (tmp_path / "run/checkpoints/2.damaged").is_dir()
    weights.rmdir()
    (tmp_path / "elsewhere").rename(weights)
    with pytest.raises(ValueError, match="checksum of the weights"):  # which the run has not forgotten
        train(dataclasses.replace(longer, steps=6))


def test_nothing_is_frozen_that_was_never_trained(capsys):
    with pytest.raises(ValueError, match="freeze keeps the backbone as it is.*add --pretrained"):
        Config(freeze="backbone")
    with pytest.raises(SystemExit) as exit:
        parse(["digits", "--freeze", "backbone"], "train")
    assert exit.value.code == 2 and "add --pretrained" in capsys.readouterr().err
    assert parse(["finetune", "--freeze", "backbone"], "train").freeze == "backbone"


def test_the_normalisation_and_the_origin_of_the_weights_are_kept(tmp_path):
    setting = res2net_jax.variants.Preprocessing(size=64, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bicubic")
    model = res2net_jax.create("res2net50_26w_4s", layers=(1,), channels=(8,), num_classes=2)
    model.preprocessing = setting
    res2net_jax.save(model, tmp_path / "weights", source={"origin": "hf://timm/res2net50_26w_4s.in1k"})
    pictures = write_pictures(tmp_path / "pictures", range(2), ("no", "yes"))
    run = trained(finetune(tmp_path / "weights", pictures, tmp_path / "run", epochs=2, steps=1))
    learned = res2net_jax.load(run / "checkpoints")
    assert learned.preprocessing == dataclasses.replace(setting, size=32, crop_pct=1.0)
    assert learned.derived_from == "res2net50_26w_4s"
    assert json.loads((run / "config.json").read_text())["freeze"] is None
