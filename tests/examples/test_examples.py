"""The examples, run as a user runs them."""

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# Predicting nothing but background has a mean IoU of at most 0.25.
@pytest.mark.parametrize(("steps", "least"), [(400, 0.5), pytest.param(800, 0.6, marks=pytest.mark.soak)])
def test_segmentation_learns(tmp_path, steps, least, optimized):
    segmentation = load("segmentation")
    mean = segmentation.main(segmentation.Config(steps=steps, output=tmp_path / "s.png"))
    assert mean > least
    assert (tmp_path / "s.png").stat().st_size > 10_000


def test_port_and_classify(tmp_path, capsys):
    example = load("port_and_classify")
    example.main(example.Config(model="res2net50_48w_2s", output=tmp_path))
    out = capsys.readouterr().out
    assert "RANDOM weights" in out and "certified against timm" in out
    assert (tmp_path / "predictions.png").stat().st_size > 10_000
