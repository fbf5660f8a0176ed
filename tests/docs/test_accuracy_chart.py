"""The chart that README.md shows is what its script draws from VARIANTS, and can be read."""

import importlib.util
import itertools
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest

import res2net_jax

FOLDER = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def chart():
    spec = importlib.util.spec_from_file_location("accuracy_chart", FOLDER / "accuracy_chart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def places(file):
    """Where the points of the models are in an SVG."""
    groups = xml.etree.ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}g")
    points = {group.get("id"): group.find(".//{http://www.w3.org/2000/svg}use") for group in groups}
    return {name: (float(points[name].get("x")), float(points[name].get("y"))) for name in res2net_jax.VARIANTS}


def test_the_committed_chart_shows_what_the_table_says():
    pixels = np.array(list(places(FOLDER / "accuracy.svg").values()))
    facts = np.array([(v.macs, v.imagenet.top1) for v in res2net_jax.VARIANTS.values()])
    for axis, direction in ((0, 1), (1, -1)):
        line = np.polyfit(facts[:, axis], pixels[:, axis], 1)
        assert line[0] * direction > 0
        np.testing.assert_allclose(np.polyval(line, facts[:, axis]), pixels[:, axis], atol=0.01)  # in points


def test_the_script_still_draws_the_committed_chart(chart, tmp_path):
    chart.save(chart.draw(), tmp_path / "accuracy.svg")
    drawn, committed = places(tmp_path / "accuracy.svg"), places(FOLDER / "accuracy.svg")
    # Another version of matplotlib or its font may move the axes a little.
    np.testing.assert_allclose(list(drawn.values()), list(committed.values()), atol=5)


def test_names_do_not_overlap(chart):
    figure = chart.draw()
    figure.canvas.draw()
    (axes,) = figure.axes
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
    assert set(res2net_jax.VARIANTS) <= set(boxes)
    for (one, box), (other, another) in itertools.combinations(boxes.items(), 2):
        assert not box.overlaps(another), f"{one} overlaps {other}"
    page = figure.bbox
    for name, box in boxes.items():
        assert page.x0 <= box.x0 and box.x1 <= page.x1, f"{name} is cut off"
        for variant in res2net_jax.VARIANTS.values():
            assert not box.contains(*axes.transData.transform(chart.point(variant))), f"{name} hides {variant.name}"
