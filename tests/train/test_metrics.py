"""Counts of right answers, against a direct reading of their definition and against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from train.imagenet_subsets import IMAGENET_A, IMAGENET_R
from train.metrics import count


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def as_ints(counts):
    return {key: int(value) for key, value in counts.items()}


def test_top1_and_top5_are_those_of_torch(rng):
    logits = rng.normal(size=(200, 30)).astype(np.float32)
    labels = rng.integers(0, 30, 200).astype(np.int32)
    top = torch.topk(torch.tensor(logits), 5).indices.numpy()
    expected = {"top1": (top[:, :1] == labels[:, None]).sum(), "top5": (top == labels[:, None]).sum(), "count": 200}
    assert 0 < expected["top1"] < expected["top5"] < 200
    assert as_ints(jax.jit(count)(logits, labels, np.ones(200, bool))) == expected


def test_padding_is_not_counted(rng):
    logits = rng.normal(size=(64, 10)).astype(np.float32)
    labels = rng.integers(0, 10, 64).astype(np.int32)
    mask = np.arange(64) < 41
    alone = count(logits[:41], labels[:41], mask[:41])
    padded = count(logits, np.where(mask, labels, -1), mask)
    assert as_ints(padded) == as_ints(alone)
    assert int(padded["count"]) == 41


def test_any_of_several_labels_is_right_and_none_is_not_counted(rng):
    logits = rng.normal(size=(300, 40)).astype(np.float32)
    labels = rng.random((300, 40)) < 0.04
    top = np.argsort(-logits, axis=1)
    some = labels.any(1)
    assert 0 < (~some).sum() < 300
    right = [np.take_along_axis(labels, top[:, :k], 1).any(1).sum() for k in (1, 5)]
    counts = count(logits, labels, np.ones(300, bool))
    assert as_ints(counts) == {"top1": right[0], "top5": right[1], "count": some.sum()}


def test_a_subset_of_the_classes_hides_the_others(rng):
    subset = (3, 4, 11, 17, 18, 19, 25)
    logits = rng.normal(size=(100, 30)).astype(np.float32)
    labels = rng.choice(subset, 100).astype(np.int32)
    within = logits[:, list(subset)]
    top = np.array(subset)[np.argsort(-within, axis=1)]
    expected = {"top1": (top[:, 0] == labels).sum(), "top5": (top[:, :5] == labels[:, None]).any(1).sum(), "count": 100}
    assert as_ints(count(logits, labels, np.ones(100, bool), subset)) == expected
    assert as_ints(count(logits, labels, np.ones(100, bool)))["top1"] < expected["top1"]


def test_ties_go_to_the_first_class():
    logits = jnp.zeros((10, 10))
    counts = count(logits, jnp.arange(10), jnp.ones(10, bool))
    assert as_ints(counts) == {"top1": 1, "top5": 5, "count": 10}


def test_nan_is_wrong_and_counted():
    logits = jnp.zeros((3, 4)).at[1].set(jnp.nan).at[2, 3].set(jnp.nan)
    assert as_ints(count(logits, jnp.zeros(3, int), jnp.ones(3, bool))) == {"top1": 1, "top5": 1, "count": 3}


def test_fewer_than_five_classes():
    logits = jnp.array([[0.0, 1.0, 2.0]])
    assert as_ints(count(logits, jnp.array([0]), jnp.ones(1, bool))) == {"top1": 0, "top5": 1, "count": 1}


@pytest.mark.parametrize("name, ours", [("imagenet_a", IMAGENET_A), ("imagenet_r", IMAGENET_R)])
def test_class_subsets_are_those_of_the_published_tables(name, ours):
    from importlib.resources import files

    text = files("timm").joinpath("data", "_info", f"{name}_indices.txt").read_text()
    assert ours == tuple(map(int, text.split()))
