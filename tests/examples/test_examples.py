"""The examples, run as a user runs them."""

import importlib.util
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_segmentation_learns(tmp_path):
    segmentation = load("segmentation")
    mean = segmentation.main(segmentation.Config(steps=400, output=tmp_path / "s.png"))
    assert mean > 0.5  # predicting nothing but background has at most 0.25
    assert (tmp_path / "s.png").stat().st_size > 10_000


def test_port_and_classify(tmp_path, capsys):
    example = load("port_and_classify")
    example.main(example.Config(model="res2net50_48w_2s", output=tmp_path))
    out = capsys.readouterr().out
    assert "RANDOM weights" in out and "certified against timm" in out
    assert (tmp_path / "predictions.png").stat().st_size > 10_000
