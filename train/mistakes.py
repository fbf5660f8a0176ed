"""What a trained model gets wrong, as two pictures: confusion.png and mistakes.png."""

import os
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np

from res2net_jax.command_line import say
from res2net_jax.files import first_line
from res2net_jax.inference import class_names
from res2net_jax.model import Res2Net
from res2net_jax.preprocess import resize_and_crop
from train import transforms
from train.datasets import Dataset

#: With more classes than this a matrix cannot be read, and the most confused pairs are shown instead.
MOST_CLASSES = 40
_PAIRS = 30
_ROWS, _COLUMNS = 4, 6
_RED, _GREY = "#c0392b", "#666666"


def draw_mistakes(folder: Path, dataset: Dataset, model: Res2Net, answers: dict[str, np.ndarray]) -> None:
    """Writes ``confusion.png`` and ``mistakes.png`` into ``folder``. A failure is a warning, not the end of a run.

    Args:
        folder: The run's.
        dataset: What was evaluated.
        model: The evaluated model, for its class names and its preprocessing.
        answers: ``label``, ``prediction`` and ``probability`` of each example, in the order of ``dataset``.
    """
    import matplotlib

    names = class_names(model)
    # Class names are text, not formulas; one in a script that no font here has is no reason to warn for each letter.
    style = {"text.parse_math": False, "font.size": 10, "font.family": ["sans-serif", *_fonts_of_other_scripts()]}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        try:
            _save(_confusion(names, answers), folder / "confusion.png")
            _save(_mistakes(names, dataset, model.preprocessing, answers), folder / "mistakes.png")
        except Exception as error:
            say(f"WARNING: the mistakes cannot be drawn ({first_line(error)}); the run itself is complete", sys.stderr)


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Int [classes, classes]: how many examples of the row's class were taken for the column's."""
    return np.bincount(labels * classes + predictions, minlength=classes * classes).reshape(classes, classes)


def worst_mistakes(answers: dict[str, np.ndarray], most: int) -> np.ndarray:
    """Numbers of the wrong answers with the highest probabilities, the highest first."""
    wrong = np.flatnonzero(answers["label"] != answers["prediction"])
    return wrong[np.argsort(-answers["probability"][wrong], kind="stable")][:most]


def confused_pairs(labels: np.ndarray, predictions: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """``(class, taken for, how often)``, the most frequent confusion first."""
    wrong = labels != predictions
    pairs, counts = np.unique(np.stack([labels[wrong], predictions[wrong]]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    return [(int(pairs[0, i]), int(pairs[1, i]), int(counts[i])) for i in order]


def _confusion(names, answers):
    labels, predictions = answers["label"], answers["prediction"]
    wrong = int(np.sum(labels != predictions))
    title = f"{len(labels):,} pictures, {100 * (1 - wrong / len(labels)):.2f} % right"
    if len(names) > MOST_CLASSES:
        return _bars(names, labels, confused_pairs(labels, predictions, _PAIRS), title)
    return _matrix(names, confusion_matrix(labels, predictions, len(names)), title)


def _matrix(names, counts, title):
    from matplotlib.figure import Figure

    classes = len(names)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    short = [_shorten(name, 24) for name in names]
    margin = 1.1 + 0.085 * max(map(len, short))
    side = max(2.4, classes * max(0.34, min(0.8, 7 / classes)))
    figure = Figure(figsize=(side + margin + 0.9, side + margin + 0.5), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    size = max(6.5, min(12, 0.3 * 72 * side / classes))
    for row, column in zip(*np.nonzero(counts)):
        count = counts[row, column]
        axes.text(
            column,
            row,
            f"{count}" if count < 10_000 else f"{count / 1000:.0f}k",
            ha="center",
            va="center",
            fontsize=size if count < 1000 else 0.8 * size,
            color="white" if shares[row, column] > 0.5 else "black" if row == column else _RED,
        )
    axes.set_xticks(range(classes), short, rotation=90 if max(map(len, short)) > 3 else 0)
    axes.set_yticks(range(classes), short)
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(classes), [f"{100 * share:.0f} %" for share in shares.diagonal()])
    right.tick_params(length=0, labelcolor=_GREY)
    right.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(classes + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(classes + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#dddddd", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    figure.suptitle(title)
    return figure


def _bars(names, labels, pairs, title):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.2 + 0.28 * max(len(pairs), 3)), layout="constrained")
    figure.suptitle(f"{title}; the most confused of {len(names)} classes")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    if not pairs:
        axes.text(0.5, 0.5, "no mistakes", ha="center", va="center", transform=axes.transAxes)
    totals = np.bincount(labels, minlength=len(names))
    bars = axes.barh(range(len(pairs)), [count for _, _, count in pairs], color="#7fa8d1")
    axes.bar_label(bars, [f"{count} of {totals[true]}" for true, _, count in pairs], padding=4, color=_GREY)
    captions = [f"{_shorten(names[true], 34)}  taken for  {_shorten(names[other], 34)}" for true, other, _ in pairs]
    axes.set_yticks(range(len(pairs)), captions)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.02)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("pictures")
    return figure


def _mistakes(names, dataset, preprocessing, answers):
    from matplotlib.figure import Figure

    wrong = int(np.sum(answers["label"] != answers["prediction"]))
    shown = worst_mistakes(answers, _ROWS * _COLUMNS)
    columns = min(_COLUMNS, max(len(shown), 3))
    rows = max(1, -(-len(shown) // columns))
    figure = Figure(figsize=(2.1 * columns, 2.8 * rows + 0.6 if wrong else 1), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)
    share = f"{wrong:,} of {len(answers['label']):,} pictures are wrong"
    figure.suptitle(f"{share}; the surest mistakes come first" if wrong else f"No mistakes: {share}")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, index in zip(grid, shown):
        label, prediction = answers["label"][index], answers["prediction"][index]
        file = _shorten(os.path.basename(dataset.source.name(int(index))), 32, end=True)
        axes.imshow(_picture(dataset, preprocessing, int(index)), cmap="gray", vmin=0, vmax=255)
        axes.set_title(
            f"{_wrap(names[prediction])}\n{100 * answers['probability'][index]:.0f} %", color=_RED, fontsize=10, pad=4
        )
        axes.set_xlabel(f"is {_wrap(names[label])}\n{file}", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    return figure


def _picture(dataset, preprocessing, index):
    """What the model saw: uint8 [h, w] or [h, w, 3]."""
    record = dataset.source[index]
    pixels = transforms.decode(transforms.open_picture(record["image"], dataset.upright), dataset.in_chans)
    return np.asarray(resize_and_crop(pixels, preprocessing, preprocessing.size))


def _fonts_of_other_scripts():
    """Those installed here; matplotlib's own has no Chinese, Japanese, Korean, Arabic or Indian letters."""
    from matplotlib import font_manager

    known = ("Noto Sans CJK", "WenQuanYi", "Hiragino Sans", "Microsoft YaHei", "Malgun Gothic", "Arial Unicode MS")
    return sorted({font.name for font in font_manager.fontManager.ttflist if font.name.startswith(known)})


def _wrap(name):
    return "\n".join(textwrap.wrap(_shorten(name, 44), 24)) or name


def _shorten(text, most, end=False):
    if len(text) <= most:
        return text
    return f"…{text[1 - most :]}" if end else f"{text[: most - 1]}…"


def _save(figure, file):
    temporary = file.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, file)
