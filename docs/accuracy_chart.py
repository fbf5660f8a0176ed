"""Draws ``accuracy.svg``, the accuracy of every model against its multiply-adds, from ``res2net_jax.VARIANTS``.

    python docs/accuracy_chart.py

Greys and colours of middling brightness on no background, so that it can be read on a white page and on a black one.
"""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from res2net_jax import VARIANTS, Variant

FILE = Path(__file__).with_name("accuracy.svg")
INK, BLUE, ORANGE, GREEN = "#7a7a7a", "#3a86d0", "#d9712b", "#2f9e6e"
KEY = {"Res2Net": BLUE, "Res2NeXt": GREEN, "Res2Net v1b (deep stem, pooling shortcuts)": ORANGE}
# Where a model's name stands beside its point: horizontal alignment, then the offset in points.
LABELS = {
    "res2net50_48w_2s": ("left", 9, -1),
    "res2net50_26w_4s": ("left", 9, -8),
    "res2net50_14w_8s": ("right", -9, -7),
    "res2next50": ("right", -9, 4),
    "res2net50d": ("left", 6, -13),
    "res2net50_26w_6s": ("left", 6, -13),
    "res2net50_26w_8s": ("left", 3, -16),
    "res2net101_26w_4s": ("right", -8, 6),
    "res2net101d": ("right", -9, 5),
}


def draw() -> Figure:
    """The chart; the group of a model's point in the SVG has the model's name as its id."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    _join(axes, ("res2net50_26w_4s", "res2net50_26w_6s", "res2net50_26w_8s"), BLUE, "more splits", (0, -11))
    _join(axes, ("res2net50_26w_4s", "res2net101_26w_4s"), BLUE, "deeper", (25, 16))
    _join(axes, ("res2net50d", "res2net101d"), ORANGE, "deeper", (5, -9))
    for variant in VARIANTS.values():
        x, y = point(variant)
        axes.plot(x, y, "o", color=_colour(variant), markersize=7, gid=variant.name)
        side, right, up = LABELS[variant.name]
        axes.annotate(
            variant.name, (x, y), (right, up), textcoords="offset points", ha=side, color=_colour(variant), fontsize=10
        )
    for row, (text, colour) in enumerate(KEY.items()):
        axes.text(0.02, 0.95 - 0.055 * row, text, color=colour, transform=axes.transAxes, fontsize=10)
    axes.set(xlim=(2.7, 9.9), ylim=(77.2, 81.6))
    axes.set_xlabel("multiply-adds of one 224 x 224 image (G)", color=INK)
    axes.set_ylabel("ImageNet-1k top-1 accuracy (%)", color=INK)
    axes.tick_params(colors=INK)
    axes.grid(color=INK, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    return figure


def point(variant: Variant) -> tuple[float, float]:
    """Multiply-adds in G, and top-1 accuracy in per cent."""
    return variant.macs / 1e9, variant.imagenet.top1


def save(figure: Figure, file: Path) -> None:
    """The same drawing gives the same bytes with the same matplotlib."""
    with matplotlib.rc_context({"svg.hashsalt": "res2net_jax"}):
        figure.savefig(file, transparent=True, metadata={"Date": None, "Title": "Accuracy against multiply-adds"})


def _join(axes, names, colour, why, offset):
    """A line, and ``offset`` points from the middle of its last part what changes along it."""
    points = [point(VARIANTS[name]) for name in names]
    axes.plot(*zip(*points), color=colour, linewidth=1.2, alpha=0.5)
    (x0, y0), (x1, y1) = points[-2:]
    middle = ((x0 + x1) / 2, (y0 + y1) / 2)
    axes.annotate(why, middle, offset, textcoords="offset points", color=colour, fontsize=8, style="italic")


def _colour(variant):
    if variant.arch.avg_down:
        return ORANGE
    return GREEN if variant.arch.cardinality > 1 else BLUE


if __name__ == "__main__":
    save(draw(), FILE)
    print(FILE)
