"""What the pipeline does to a training picture, as its switches say."""

import dataclasses

import numpy as np
import pytest
from batches import PLAIN, take
from PIL import Image

from train.data import Augment, train_batches
from train.datasets import Dataset
from train.sources import Arrays


def distorted(picture, augment, count=200):
    """So many pictures 32 x 32 made of this one, as float [count, 32, 32, 3]."""
    dataset = Dataset("one", "train", Arrays("one", picture[None], np.zeros(1, np.int32)), 2)
    batches = take(train_batches(dataset, size=32, batch_size=1, seed=0, augment=augment), count)
    return np.concatenate([batch["image"] for batch in batches]).astype(float)


def test_crops_have_the_area_and_the_aspect_asked_for():
    rows, columns = np.mgrid[:128, :128]
    picture = np.stack([2 * columns, 2 * rows, rows], -1).astype(np.uint8)
    pictures = distorted(picture, Augment(crop_scale=(0.25, 0.25), crop_ratio=(3 / 4, 4 / 3)))
    # The steepness of red and of green tells how many columns and rows were shrunk to 32.
    width = np.abs(pictures[:, 16, 28, 0] - pictures[:, 16, 4, 0]) / 24 * 16
    height = np.abs(pictures[:, 28, 16, 1] - pictures[:, 4, 16, 1]) / 24 * 16
    assert np.abs(width * height / 128**2 - 0.25).max() < 0.02
    aspect = np.log(width / height)
    assert np.abs(aspect).max() < np.log(4 / 3) + 0.05
    assert abs(aspect.mean()) < 0.04 and abs(aspect.std() - np.log(16 / 9) / np.sqrt(12)) < 0.02


@pytest.mark.parametrize("strength", [0.2, 0.4])
def test_colour_jitter_changes_the_brightness_by_its_strength(strength):
    grey = np.full((32, 32, 3), 100, np.uint8)  # on which contrast and saturation do nothing
    factors = distorted(grey, dataclasses.replace(PLAIN, color_jitter=strength)) / 100
    assert (factors == factors[:, :1, :1, :1]).all()
    assert abs(factors.min() - (1 - strength)) < 0.03 and abs(factors.max() - (1 + strength)) < 0.03
    assert abs(factors[:, 0, 0, 0].mean() - 1) < 0.05


def test_rand_augment_distorts_by_its_magnitude():
    coarse = Image.fromarray(np.random.default_rng(0).integers(60, 180, (6, 6, 3), np.uint8))
    picture = np.asarray(coarse.resize((32, 32), Image.Resampling.BICUBIC))

    def change(magnitude):
        return np.abs(distorted(picture, dataclasses.replace(PLAIN, rand_augment=magnitude)) - picture).mean((1, 2, 3))

    assert not change(None).any()
    assert np.mean(change(9) > 0) > 0.8
    assert 1 < change(3).mean() < 0.7 * change(9).mean() < 0.5 * change(30).mean()
