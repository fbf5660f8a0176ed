"""Which published figure an evaluation is put beside, and the table that its row goes to."""

import dataclasses
import re

import numpy as np
import pytest

from res2net_jax.model import Res2Net
from res2net_jax.variants import Accuracy, Arch, get_variant
from train.datasets import Dataset, open_dataset
from train.evaluate import default_table, published, summary
from train.imagenet_subsets import IMAGENET_A, IMAGENET_R
from train.sources import Arrays


def imagenet_like(name, split="validation", count=0, **options):
    pictures = Arrays(name, np.broadcast_to(np.uint8(0), (count, 1, 1, 3)), np.zeros(count, np.int32))
    return Dataset(name, split, pictures, 1000, **options)


@pytest.mark.parametrize(
    "name, attribute",
    [
        ("imagenet2012", "imagenet"),
        ("imagenet2012:5.1.0", "imagenet"),
        ("imagenet2012_real", "imagenet_real"),
        ("imagenet_v2", "imagenet_v2"),
        ("imagenet_v2/matched-frequency", "imagenet_v2"),
        ("imagenet_a", "imagenet_a"),
        ("imagenet_r", "imagenet_r"),
        ("imagenet_sketch", "imagenet_sketch"),
    ],
)
def test_published_figure_is_that_of_the_data_set(name, attribute):
    variant = get_variant("res2net50_14w_8s")
    model = Res2Net(variant.arch, name=variant.name)
    assert published(model, imagenet_like(name)) == getattr(variant, attribute)


@pytest.mark.parametrize(
    "count, subset, attribute",
    [
        (50_000, None, "imagenet"),
        (50_889, None, "imagenet_sketch"),
        (7_500, IMAGENET_A, "imagenet_a"),
        (30_000, IMAGENET_R, "imagenet_r"),
        (49_999, None, None),
        (3_925, None, None),  # ten of the classes, as Imagenette has them
        (50_000, IMAGENET_A, None),
    ],
)
def test_a_folder_is_known_by_the_number_of_its_pictures(count, subset, attribute):
    variant = get_variant("res2net50_14w_8s")
    model = Res2Net(variant.arch, name=variant.name)
    folder = imagenet_like("folder:pictures", "all", count=count, class_subset=subset)
    expected = getattr(variant, attribute) if attribute else None
    assert published(model, folder) == expected
    told = summary("mine", model, folder, variant.preprocessing, count, Accuracy(70.0, 90.0))
    assert ("published" in told and "difference" in told) == (attribute is not None)
    larger = dataclasses.replace(variant.preprocessing, size=288)
    assert "published" not in summary("mine", model, folder, larger, count, Accuracy(70.0, 90.0))
    if attribute == "imagenet":
        assert re.search(r"published +78\.142 +93\.852\ndifference +-8\.142 +-3\.852", told), told


def test_no_published_figure_for_anything_else():
    variant = get_variant("res2net50_14w_8s")
    model = Res2Net(variant.arch, name=variant.name)
    assert published(model, imagenet_like("imagenet2012", "train")) is None
    assert published(model, imagenet_like("imagenet2012", "validation[:10]")) is None
    assert published(model, imagenet_like("imagenet_v2/topimages")) is None
    assert published(model, imagenet_like("folder:x", class_names=tuple(map(str, range(1000))))) is None
    assert published(Res2Net(Arch(), name=variant.name), imagenet_like("imagenet2012")) is None
    assert published(Res2Net(variant.arch), imagenet_like("imagenet2012")) is None


@pytest.mark.parametrize(
    "dataset, split, name",
    [
        ("imagenet2012", "validation", "results-imagenet2012.csv"),
        ("imagenet2012", "validation[:1000]", "results-imagenet2012-validation-1000.csv"),
        ("imagenet_v2/matched-frequency", "test", "results-imagenet-v2-matched-frequency-test.csv"),
        ("folder:/data/My Pictures", "train", "results-folder-data-my-pictures-train.csv"),
    ],
)
def test_each_data_set_and_split_has_a_table_of_its_own(dataset, split, name):
    assert default_table(dataset, split, "validation") == name


def test_the_same_examples_have_the_same_table_however_they_were_asked_for(tmp_path):
    for label in "ab":
        (tmp_path / "val" / label).mkdir(parents=True)
        (tmp_path / "val" / label / "1.png").touch()
    for name in ("digits", f"folder:{tmp_path}", f"folder:{tmp_path / 'val'}"):
        for split in ("validation", "test"):
            dataset = open_dataset(name, split)
            assert default_table(dataset.name, dataset.split, dataset.held_out) == default_table(name, "all", "all")
    training = open_dataset("digits", "train")
    assert default_table("digits", training.split, training.held_out) == "results-digits-train.csv"
