"""The pictures of what went wrong: counted right, drawn for any number of classes and any name."""

import numpy as np
import pytest
import sklearn.metrics
from PIL import Image

import res2net_jax
from res2net_jax.variants import Preprocessing
from train.datasets import open_dataset
from train.mistakes import confused_pairs, confusion_matrix, draw_mistakes, worst_mistakes


def answers(classes, count=355, wrong=0.3):
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, count)
    predictions = np.where(rng.random(count) < wrong, rng.integers(0, classes, count), labels)
    return {"label": labels, "prediction": predictions, "probability": rng.random(count)}


def test_confusion_matrix_equals_scikit_learns():
    given = answers(7)
    matrix = confusion_matrix(given["label"], given["prediction"], 7)
    expected = sklearn.metrics.confusion_matrix(given["label"], given["prediction"], labels=range(7))
    np.testing.assert_array_equal(matrix, expected)


def test_the_most_confused_pairs_are_the_largest_cells():
    given = answers(7)
    matrix = sklearn.metrics.confusion_matrix(given["label"], given["prediction"])
    np.fill_diagonal(matrix, 0)
    pairs = confused_pairs(given["label"], given["prediction"], 5)
    assert [count for _, _, count in pairs] == sorted(matrix.ravel())[:-6:-1]
    assert all(matrix[true, other] == count for true, other, count in pairs)


def test_the_worst_mistakes_are_wrong_and_sure():
    given = {
        "label": np.array([0, 1, 2, 3, 4]),
        "prediction": np.array([0, 0, 2, 2, 1]),
        "probability": np.array([0.99, 0.6, 0.98, 0.9, 0.7]),
    }
    assert worst_mistakes(given, 2).tolist() == [3, 4]
    assert worst_mistakes(given, 9).tolist() == [3, 4, 1]


def model(names):
    model = res2net_jax.create("res2net50_26w_4s", layers=(1,), channels=(8,), num_classes=len(names), in_chans=1)
    model.class_names = names
    model.preprocessing = Preprocessing(size=16, mean=(0.5,), std=(0.25,))
    return model


NAMES = {
    "two": ("cat", "dog"),
    "odd-names": ("a$b$", "$\\frac$", "two\nlines", "猫 ☂", "", "x" * 200),
    "forty": tuple(f"breed number {i}" for i in range(40)),
    "many": tuple(f"breed number {i}" for i in range(300)),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("wrong", [0.3, 0], ids=["mistakes", "none"])
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_both_are_drawn(tmp_path, capsys, names, wrong):
    draw_mistakes(tmp_path, open_dataset("digits", "test"), model(names), answers(len(names), wrong=wrong))
    assert capsys.readouterr().err == ""
    assert sorted(file.name for file in tmp_path.iterdir()) == ["confusion.png", "mistakes.png"]
    for file in tmp_path.iterdir():
        with Image.open(file) as picture:
            assert np.asarray(picture.convert("L")).std() > 5
            assert max(picture.size) < 4000


def test_a_folder_that_cannot_be_written_to_is_a_warning(tmp_path, capsys):
    draw_mistakes(tmp_path / "gone", open_dataset("digits", "test"), model(("0", "1")), answers(2))
    assert "WARNING: the mistakes cannot be drawn" in capsys.readouterr().err
