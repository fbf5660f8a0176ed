"""Every recipe and every switch trains; schedules, masks and layer-wise rates are what they say."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import res2net_jax
from train.config import RECIPES, Config, parse, to_json
from train.data import Augment
from train.datasets import open_dataset
from train.optimizer import learning_rate, make_optimizer
from train.report import read_rows
from train.start import build_model
from train.step import init_state, make_forward, make_train_step, split

from .conftest import arrays, small, train

SMALL = {"layers": (1, 1), "channels": (8, 8), "scale": 2, "size": 16}


def run(tmp_path, recipe, **changes):
    fields = {
        "dataset": "digits",
        "steps": 3,
        "batch_size": 128,
        "log_every": 1,
        "output": str(tmp_path / "run"),
        **SMALL,
    }
    config = dataclasses.replace(RECIPES[recipe](), **{**fields, **changes})
    assert train(config) == 0
    rows = read_rows(tmp_path / "run" / "metrics.csv")
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 3]
    assert all(np.isfinite(float(row["loss"])) for row in rows[:3])
    assert rows[3]["val_count"] == "355"
    model = res2net_jax.load(tmp_path / "run" / "checkpoints")
    assert model(jnp.zeros((1, 16, 16, 1))).shape == (1, 10)
    return config, rows, model


# With 11 steps in an epoch.
@pytest.mark.parametrize(
    "recipe, rates",
    [
        ("paper", [0.05, 0.05, 0.05]),
        ("cosine", [0.05 / 55, 0.1 / 55, 0.15 / 55]),
        ("v1b", [0.05 / 55, 0.1 / 55, 0.15 / 55]),
        ("digits", [0.2 / 11, 0.4 / 11, 0.6 / 11]),
    ],
)
def test_recipe(tmp_path, recipe, rates):
    config, rows, model = run(tmp_path, recipe)
    assert [float(row["lr"]) for row in rows[:3]] == pytest.approx(rates, rel=1e-5)
    assert model.class_names == tuple("0123456789")
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == to_json(config)


def test_the_papers_recipe():
    config = RECIPES["paper"]()
    optimiser = {"lr": 0.1, "batch_size": 256, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4}
    optimiser |= {"decay_all": True, "clip_norm": None, "accumulate": 1, "ema": None, "label_smoothing": 0.1}
    schedule = {"epochs": 100, "schedule": "steps", "decay_epochs": 30, "warmup_epochs": 0}
    pictures = {"dataset": "imagenet2012", "size": 224, "mixup": 0, "cutmix": 0, "random_erasing": 0}
    pictures["augment"] = Augment(crop_scale=(0.08, 1), crop_ratio=(3 / 4, 4 / 3), flip=0.5, color_jitter=0)
    network = {"model": "res2net50_26w_4s", "batchnorm_group": 64, "dtype": "float32", "zero_init_last": False}
    expected = {**optimiser, **schedule, **pictures, **network}
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.peak_lr == 0.1 and config.augment.rand_augment is None and not config.arch


COSINE = {"schedule": "cosine", "decay_all": False}


@pytest.mark.parametrize(
    "recipe, changes",
    [
        ("cosine", {"warmup_epochs": 5, "zero_init_last": True}),
        ("v1b", {"warmup_epochs": 5, "epochs": 300, "mixup": 0.2, "model": "res2net50d"}),
        ("finetune", {"warmup_epochs": 1, "epochs": 20, "lr": 0.02, "layer_decay": 0.85, "pretrained": True}),
    ],
)
def test_other_recipes_are_the_papers_but_for(recipe, changes):
    paper = dataclasses.replace(RECIPES["paper"](), batchnorm_group=None, **COSINE, **changes)
    assert dataclasses.replace(RECIPES[recipe](), dataset=paper.dataset) == paper


def test_the_model_is_made_by_its_switches():
    arch = {"layers": (1, 2), "channels": (8, 16), "base_width": 13, "scale": 3}
    arch |= {"drop_rate": 0.1, "drop_path_rate": 0.2, "drop_block_rate": 0.3}
    digits, scales = open_dataset("digits", "train"), []
    for zero in (True, False):
        model = build_model(Config(**arch, dtype="bfloat16", zero_init_last=zero), digits)
        assert {name: getattr(model.arch, name) for name in arch} == arch
        assert (model.dtype, model.param_dtype, model.num_classes) == (jnp.bfloat16, jnp.float32, 10)
        scales.append(float(model.layer2[1].bn3.scale[...].sum()))
    assert scales[0] == 0 < scales[1]


def test_finetune_starts_from_the_weights_and_holds_the_lower_layers_back(tmp_path):
    arch = {name: SMALL[name] for name in ("layers", "channels", "scale")}
    pretrained = res2net_jax.create("res2net50_26w_4s", num_classes=5, zero_init_last=False, **arch)
    res2net_jax.save(pretrained, tmp_path / "pretrained")
    before = arrays_of(tmp_path / "pretrained")
    _, _, model = run(tmp_path, "finetune", model=str(tmp_path / "pretrained"), warmup_epochs=0, layer_decay=0.1)
    after = {path.removeprefix("model/"): value for path, value in arrays(tmp_path / "run").items()}
    moved = {
        path: np.abs(after[path] - before[path]).max()
        for path in before
        if path.endswith("kernel") and "fc" not in path
    }
    stem, last = moved["conv1.kernel"], moved["layer2.0.conv3.kernel"]
    assert 0 < stem < 0.1 * last < 0.01
    assert model.num_classes == 10


def arrays_of(folder):
    model = res2net_jax.load(folder, in_chans=1)
    return {path: np.asarray(leaf.get_value()) for path, leaf in res2net_jax.init.variables(model).items()}


@pytest.mark.parametrize(
    "switches",
    [
        {"nesterov": True, "clip_norm": 1.0, "decay_all": False, "layer_decay": 0.8, "label_smoothing": 0.0},
        {"drop_rate": 0.1, "drop_path_rate": 0.1, "drop_block_rate": 0.1},
        {"mixup": 0.2, "random_erasing": 0.25, "augment": Augment(rand_augment=9, color_jitter=0.4)},
        {"cutmix": 1.0, "mixup": 0.8, "ema": 0.99, "accumulate": 2, "remat": True, "batchnorm_group": 16},
        {"momentum": 0.0, "weight_decay": 0.0},
        {"dtype": "bfloat16", "zero_init_last": True, "warmup_epochs": 2, "eval_batch_size": 64, "workers": 1},
    ],
    ids=lambda switches: "-".join(switches),
)
def test_switches(tmp_path, switches):
    _, rows, model = run(tmp_path, "cosine", **switches)
    rates = {name: rate for name, rate in switches.items() if name.startswith("drop_")}
    assert {name: getattr(model.arch, name) for name in rates} == rates
    saved = arrays(tmp_path / "run")
    assert {str(value.dtype) for name, value in saved.items() if name != "training/step"} == {"float32"}
    if "ema" in switches:
        assert not np.array_equal(saved["model/conv1.kernel"], saved["training/raw.conv1.kernel"])


@pytest.mark.parametrize(
    "layers, rate", [((1,), "drop_rate"), ((2,), "drop_path_rate"), ((1, 1, 1), "drop_block_rate")]
)
def test_each_kind_of_dropout_draws_from_the_key(layers, rate):
    config = Config(layers=layers, channels=(8,) * len(layers), scale=2, **{rate: 0.5})
    model = build_model(config, open_dataset("digits", "train"))
    forward = jax.jit(make_forward(model, config, training=True))
    images = jax.random.normal(jax.random.key(0), (8, 32, 32, 1))
    one, again, other = (forward(*split(model), images, jax.random.key(seed))[0] for seed in (1, 1, 2))
    assert np.array_equal(one, again) and not np.array_equal(one, other)


def test_pictures_are_made_as_the_switches_say(tmp_path, monkeypatch):
    class Asked(Exception):
        pass

    def train_batches(dataset, **options):
        raise Asked(dataset.name, options)

    monkeypatch.setattr("train.imagenet.train_batches", train_batches)
    switches = {"augment": Augment(rand_augment=9, color_jitter=0.4), "seed": 3, "workers": 5, "batch_size": 40}
    with pytest.raises(Asked) as asked:
        train(small(tmp_path, size=24, **switches))
    name, options = asked.value.args
    shares = {"process_index": 0, "process_count": 1}
    assert name == "digits" and options == {**switches, **shares, "size": 24, "start": 0}


def test_command_line_switches():
    config = parse(
        ["finetune", "--no-pretrained", "--crop-scale", "0.5", "1", "--layers", "2", "2", "--ema", "0.99"], "train"
    )
    expected = dataclasses.replace(
        RECIPES["finetune"](), pretrained=False, augment=Augment(crop_scale=(0.5, 1.0)), layers=(2, 2), ema=0.99
    )
    assert config == expected
    assert parse([], "train") == RECIPES["paper"]()


@pytest.mark.parametrize("schedule", ["steps", "cosine"])
def test_learning_rate(schedule):
    config = Config(schedule=schedule, batch_size=512, epochs=100, warmup_epochs=5)

    def lr(epoch):
        return float(learning_rate(config, round(epoch * 10), 10))

    assert config.peak_lr == 0.2
    assert lr(0) == pytest.approx(0.2 / 50) and lr(2.4) == pytest.approx(0.1) and lr(4.9) == pytest.approx(0.2)
    if schedule == "steps":
        assert [lr(e) for e in (5, 29.9, 30, 59.9, 60, 99.9)] == pytest.approx([0.2, 0.2, 0.02, 0.02, 0.002, 0.0002])
    else:
        assert [lr(e) for e in (5, 52.5, 100, 147.5, 195)] == pytest.approx([0.2, 0.1, 0, 0, 0], abs=1e-8)


@pytest.mark.parametrize("schedule", ["steps", "cosine"])
def test_learning_rate_of_a_float64_run(schedule, x64):
    config = Config(schedule=schedule, epochs=100, warmup_epochs=3, lr=0.3, dtype="float64")
    step, progress = np.arange(3700), (np.arange(3700) - 111) / 3589
    after = 0.15 * (1 + np.cos(progress * np.pi)) if schedule == "cosine" else 0.3 * 0.1 ** (step // 37 // 30)
    expected = np.where(step < 111, 0.3 * (step + 1) / 111, after)
    np.testing.assert_allclose(learning_rate(config, step.astype("int32"), 37), expected, rtol=1e-12)


def test_decay_mask_leaves_norms_and_biases_alone():
    params = {"conv1.kernel": jnp.ones((1, 1, 1, 1)), "bn1.scale": jnp.ones(1), "fc.bias": jnp.ones(1)}
    config = Config(decay_all=False, momentum=0, weight_decay=0.5)
    optimizer = make_optimizer(config, res2net_jax.create("res2net50_26w_4s", layers=(1,), channels=(8,)))
    directions, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert {path: float(d.sum()) for path, d in directions.items()} == {
        "conv1.kernel": 0.5,
        "bn1.scale": 0,
        "fc.bias": 0,
    }


def test_layer_decay_slows_a_block_by_its_distance_from_the_classifier():
    model = res2net_jax.create("res2net50_26w_4s", layers=(2, 1), channels=(8, 8), num_classes=2)
    paths = [
        "conv1.kernel",
        "bn1.scale",
        "layer1.0.conv1.kernel",
        "layer1.1.bn1.bias",
        "layer2.0.conv3.kernel",
        "fc.bias",
    ]
    gradients = {path: jnp.ones(3) for path in paths}
    optimizer = make_optimizer(Config(layer_decay=0.5, momentum=0, weight_decay=0), model)
    directions, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
    assert [float(directions[path][0]) for path in paths] == [0.0625, 0.0625, 0.125, 0.25, 0.5, 1]


def test_bfloat16_follows_float32():
    """The loss of a small network that learns a batch by heart, in both types."""
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (32, 32, 32, 3), np.uint8),
        "label": rng.integers(0, 7, 32).astype(np.int32),
        "stop": np.zeros(1, np.int32),
    }

    def losses(dtype):
        config = Config(dtype=dtype, lr=0.4, batch_size=32)
        model = res2net_jax.create("res2net50_26w_4s", num_classes=7, layers=(1, 1), channels=(16, 16), dtype=dtype)
        step = jax.jit(make_train_step(model, config, 100, (0.5,) * 3, (0.25,) * 3))
        state, history = init_state(model, config), []
        for _ in range(30):
            state, metrics = step(state, batch)
            history.append(float(metrics["loss"]))
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}
        return np.array(history)

    exact, coarse = losses("float32"), losses("bfloat16")
    assert exact[-1] < 0.6 * exact[0]
    np.testing.assert_allclose(coarse, exact, rtol=0.05)
    assert not np.array_equal(coarse, exact)


@pytest.mark.parametrize("recipe", ["paper", "digits"])
def test_dry_run_trains_nothing(capsys, tmp_path, recipe):
    changes = {**SMALL, "dataset": "digits", "batch_size": 128, "dry_run": True, "output": str(tmp_path / "run")}
    assert train(dataclasses.replace(RECIPES[recipe](), **changes)) == 0
    out = capsys.readouterr().out
    assert "11 an epoch" in out and "parameters, 10 classes" in out
    assert "image  uint8 [128, 16, 16, 1]" in out and "MiB a device" in out
    assert not (tmp_path / "run").exists()


def test_fake_data_needs_no_data(capsys, tmp_path):
    changes = {**SMALL, "batch_size": 16, "steps": 3, "fake_data": True, "batchnorm_group": None}
    assert train(dataclasses.replace(RECIPES["paper"](), output=str(tmp_path / "run"), **changes)) == 0
    assert "images/s" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
