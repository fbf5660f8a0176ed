"""``predict``: what is in pictures."""

import contextlib
import sys

import jax.numpy as jnp
import numpy as np

from res2net_jax import explanation, files, hub
from res2net_jax.arch import natural
from res2net_jax.commands import outputs, report
from res2net_jax.commands.batches import Pictures, stack
from res2net_jax.commands.inputs import below, find_pictures
from res2net_jax.commands.options import Folder, Inputs, Model, OutputFile, Text
from res2net_jax.fusion import compile
from res2net_jax.inference import class_names, likeliest, picture_setting
from res2net_jax.overlay import overlay
from res2net_jax.preprocess import open_picture, preprocess, resize_and_crop


def predict(
    model: Model,
    inputs: Inputs,
    top_k: int = 5,
    csv: OutputFile = None,
    json_lines: OutputFile = None,
    json: bool = False,
    html: OutputFile = None,
    explain: bool = False,
    force: bool = False,
    strict: bool = False,
    batch_size: int = 32,
    source: Text = None,
    check_hash: bool = True,
    cache_dir: Folder = None,
) -> int:
    """python -m res2net_jax predict res2net50d photo.jpg holidays/ --html report.html

    Names what is in pictures. A picture that cannot be read is left out and named at the end.

    Exit code: 0 done; 1 with --strict, if a picture was left out; 2 a mistake, or no picture can be read; 130
    interrupted.

    Args:
        model: A name, a checkpoint folder, or hf://user/name.
        inputs: Pictures, folders, wildcards in quotes, or - for a list on standard input.
        top_k: Classes to show.
        csv: Write a row per picture and class; - for standard output.
        json_lines: Write an object per picture and line; - for standard output.
        json: Print the objects as one array.
        html: Write a page with a card per picture, which needs nothing beside it.
        explain: In the page, also show where the evidence for the likeliest class is (Grad-CAM).
        force: Replace outputs that exist.
        strict: Exit with 1 if a picture was left out.
        batch_size: Pictures to run at a time.
        source: For a name, where to take its weights from instead of the release.
        check_hash: Take a source whose SHA-256 does not begin as its file name says.
        cache_dir: Cache folder, by default $RES2NET_JAX_HOME or the platform's own.
    """
    natural("--top-k", top_k, least=1)
    natural("--batch-size", batch_size, least=1)
    on_stdout = [name for name, file in (("--csv", csv), ("--json-lines", json_lines)) if str(file) == "-"]
    on_stdout += ["--json"] * json
    if len(on_stdout) > 1:
        raise ValueError(f"{' and '.join(on_stdout)} both write to standard output; give one of them a file")
    if explain and html is None:
        raise ValueError("--explain goes with --html; for overlays as files: python -m res2net_jax explain")
    for file in (csv, json_lines, html):
        if file is not None and str(file) != "-":
            files.check_new(file, force)
    paths = find_pictures(inputs)

    loaded = hub.load(model, source=source, cache_dir=cache_dir, check_hash=check_hash)
    setting, names = picture_setting(loaded), class_names(loaded)
    transform, run = preprocess(setting), compile(loaded)

    def read(path):
        image = open_picture(path)
        return transform(image), resize_and_crop(image, setting, report.SIDE) if html else None

    listed = not (on_stdout or csv or json_lines or html)
    size = min(batch_size, len(paths))
    pictures = Pictures(paths, read, size, quiet=listed and sys.stdout.isatty())  # the list is progress enough
    with contextlib.ExitStack() as opened:
        writers = []
        if listed:
            writers.append(opened.enter_context(outputs.listing()))
        if csv:
            writers.append(opened.enter_context(outputs.csv_rows(csv, force)))
        if json_lines:
            writers.append(opened.enter_context(outputs.json_lines(json_lines, force)))
        if json:
            writers.append(opened.enter_context(outputs.json_array()))
        if html:
            page = report.report(html, loaded.name, below(paths), pictures.failures, force=force, explained=explain)
            writers.append(opened.enter_context(page))
        for batch, results in pictures:
            images, crops = zip(*results)
            images = jnp.asarray(stack(images, size))
            predictions = likeliest(run(images)[: len(batch)], names, min(top_k, loaded.num_classes))
            heats = [None] * len(batch)
            if explain:
                classes = np.zeros(size, int)
                classes[: len(batch)] = [first.index for first, *_ in predictions]
                heats = map(overlay, crops, np.asarray(explanation.explain(loaded, images, classes=classes)))
            for answer in map(outputs.Answer, batch, predictions, crops, heats):
                for write in writers:
                    write(answer)
        pictures.report()
    return int(strict and bool(pictures.failures))
