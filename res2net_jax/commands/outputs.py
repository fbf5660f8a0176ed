"""Where the answers of ``predict`` go: the terminal, CSV or JSON, each written picture by picture."""

import contextlib
import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from PIL import Image

from res2net_jax import files
from res2net_jax.inference import Prediction


class Answer(NamedTuple):
    """What was found in a picture; for a report also what the model saw of it, and the evidence over it."""

    path: Path
    predictions: list[Prediction]
    picture: Image.Image | None = None
    heat: Image.Image | None = None


Write = Callable[[Answer], None]


@contextlib.contextmanager
def listing() -> Iterator[Write]:
    """The name of a picture and below it its classes, for people."""

    def write(answer):
        lines = [f"  {prediction.probability:6.1%}  {prediction.label}" for prediction in answer.predictions]
        print(answer.path, *lines, sep="\n", flush=True)

    yield write


@contextlib.contextmanager
def csv_rows(file: Path, force: bool = False) -> Iterator[Write]:
    """A row per class of a picture, with its rank from 1."""
    with _open(file, force) as stream:
        rows = csv.writer(stream, lineterminator="\n")
        rows.writerow(("file", "rank", "index", "label", "probability"))

        def write(answer):
            for rank, (label, probability, index) in enumerate(answer.predictions, start=1):
                rows.writerow((answer.path, rank, index, label, f"{probability:.6g}"))

        yield write


@contextlib.contextmanager
def json_lines(file: Path, force: bool = False) -> Iterator[Write]:
    """An object per picture, one a line: ``{"file": ..., "predictions": [{"label", "probability", "index"}, ...]}``."""
    with _open(file, force) as stream:

        def write(answer):
            stream.write(_json(answer) + "\n")

        yield write


@contextlib.contextmanager
def json_array() -> Iterator[Write]:
    """The objects of :func:`json_lines` as one array on standard output."""
    separator = "[\n"

    def write(answer):
        nonlocal separator
        sys.stdout.write(separator + _json(answer))
        separator = ",\n"

    yield write
    if separator != "[\n":
        print("\n]")


def _json(answer):
    predictions = [prediction._asdict() for prediction in answer.predictions]
    return json.dumps({"file": str(answer.path), "predictions": predictions})


@contextlib.contextmanager
def _open(file: Path, force: bool) -> Iterator[IO]:
    if str(file) == "-":
        yield sys.stdout
    else:
        with files.new_file(file, overwrite=force) as stream:
            yield stream
