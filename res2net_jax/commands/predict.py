"""``predict``: what is in pictures."""

import contextlib
import os
import sys

import jax.numpy as jnp
import numpy as np

from res2net_jax import explanation, files, hub
from res2net_jax.checks import natural
from res2net_jax.command_line import silence_stdout
from res2net_jax.commands import outputs, report
from res2net_jax.commands.batches import Pictures, stack
from res2net_jax.commands.inputs import below, find_pictures
from res2net_jax.commands.options import BatchSize, CacheFolder, CheckHash, Inputs, Model, OutputFile, Source
from res2net_jax.decoding import uninterrupted
from res2net_jax.fusion import compile
from res2net_jax.inference import class_names, likeliest
from res2net_jax.overlay import overlay
from res2net_jax.preprocess import open_picture, picture_setting, preprocess, resize_and_crop


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
    batch_size: BatchSize = 32,
    source: Source = None,
    check_hash: CheckHash = True,
    cache_dir: CacheFolder = None,
) -> int:
    """python -m res2net_jax predict res2net50d photo.jpg holidays/ --html report.html

    Names what is in pictures. A picture that cannot be read is left out and named at the end.

    Exit code: 0 done; 1 with --strict, if a picture was left out; 2 a mistake, or no picture can be read; 130
    interrupted.

    Args:
        top_k: Classes to show.
        csv: Write a row per picture and class; - for standard output.
        json_lines: Write an object per picture and line; - for standard output.
        json: Print the objects as one array.
        html: Write a page with a card per picture, which needs nothing beside it.
        explain: In the page, also show where the evidence for the likeliest class is (Grad-CAM).
        force: Replace outputs that exist.
        strict: Exit with 1 if a picture was left out.
    """
    natural("--top-k", top_k, least=1)
    natural("--batch-size", batch_size, least=1)
    on_stdout = [name for name, file in (("--csv", csv), ("--json-lines", json_lines)) if str(file) == "-"]
    on_stdout += ["--json"] * json
    if len(on_stdout) > 1:
        raise ValueError(f"{' and '.join(on_stdout)} both write to standard output; give one of them a file")
    if explain and html is None:
        raise ValueError("--explain goes with --html; for overlays as files: python -m res2net_jax explain")
    csv, json_lines, html = (file and file.expanduser() for file in (csv, json_lines, html))
    on_disk = [file for file in (csv, json_lines, html) if file is not None and str(file) != "-"]
    if len(set(map(os.path.realpath, on_disk))) < len(on_disk):
        raise ValueError("two outputs cannot be one file; give them different names")
    for file in on_disk:
        files.check_new(file, force)
    paths = find_pictures(inputs)

    loaded = hub.load(model, source=source, cache_dir=cache_dir, check_hash=check_hash)
    setting, names = picture_setting(loaded), class_names(loaded)
    transform, run = preprocess(setting), compile(loaded)

    def read(path):
        image = open_picture(path)
        return transform(image), resize_and_crop(image, setting, report.SIDE) if html else None

    @uninterrupted
    def look(images):
        """The predictions for a padded batch, and for a report with the evidence its maps."""
        images = jnp.asarray(stack(images, size))
        predictions = likeliest(run(images), names, min(top_k, loaded.num_classes))
        if not explain:
            return predictions, [None] * size
        likeliest_classes = [first.index for first, *_ in predictions]
        return predictions, np.asarray(explanation.explain(loaded, images, classes=likeliest_classes))

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
            title = loaded.name if model == loaded.name else f"{loaded.name}, {model}"
            page = report.report(html, title, below(paths), pictures.failures, force=force, explained=explain)
            writers.append(opened.enter_context(page))
        for batch, results in pictures:
            images, crops = zip(*results)
            for path, predictions, heat, crop in zip(batch, *look(images), crops):
                drawn = None if heat is None else overlay(crop, heat)
                for write in writers:
                    try:
                        write(outputs.Answer(path, predictions, crop, drawn))
                    except BrokenPipeError:  # the reader of standard output has seen enough; the other outputs go on
                        if len(writers) == 1:
                            raise
                        silence_stdout()
        pictures.report()
    if html and not on_stdout:
        print(html)
    return int(strict and bool(pictures.failures))
