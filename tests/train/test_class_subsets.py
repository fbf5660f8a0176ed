"""On pictures of ImageNet-A's 200 classes, a model is scored among these."""

import numpy as np
import pytest
from PIL import Image

import res2net_jax
from res2net_jax.variants import Preprocessing
from train.datasets import imagenet_synsets, open_dataset
from train.evaluate import evaluate
from train.imagenet_subsets import IMAGENET_A
from train.report import read_rows

from .conftest import small, train

ARCH = {"layers": (1,), "channels": (8,), "scale": 2}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A picture of each class, to learn from and to evaluate on."""
    folder, rng, synsets = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), list(imagenet_synsets())
    for split in ("train", "val"):
        for label in IMAGENET_A:
            (folder / split / synsets[label]).mkdir(parents=True)
            pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(folder / split / synsets[label] / "picture.png")
    return f"folder:{folder}"


@pytest.fixture(scope="module")
def model():
    """Its answer is always IMAGENET_A's first class, then the second and so on, but before them all the other 800."""
    model = res2net_jax.create("res2net50_26w_4s", **ARCH)
    bias = np.full(1000, 100, np.float32)
    bias[list(IMAGENET_A)] = -10 * np.arange(200)
    model.fc.bias.set_value(bias)
    return model


def test_by_the_evaluation(pictures, model):
    dataset = open_dataset(pictures, "validation")
    counts = evaluate(model, dataset, Preprocessing(size=16, crop_pct=1.0), batch_size=200)
    assert counts == {"top1": 1, "top5": 5, "count": 200}


def test_by_the_trainer(pictures, model, tmp_path):
    folder = str(res2net_jax.save(model, tmp_path / "model"))
    switches = {"model": folder, "pretrained": True, "freeze": "backbone", "lr": 1e-9, "steps": 1, "batch_size": 200}
    assert train(small(tmp_path, dataset=pictures, **switches)) == 0
    *_, row = read_rows(tmp_path / "run" / "metrics.csv")
    assert (row["val_top1"], row["val_top5"], row["val_count"]) == ("0.5", "2.5", "200")
