"""``explain``: where in pictures the evidence for a class is."""

import collections
import difflib
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from res2net_jax import explanation, files, hub
from res2net_jax.checks import natural
from res2net_jax.commands.batches import Pictures, stack
from res2net_jax.commands.inputs import below, find_pictures
from res2net_jax.commands.options import BatchSize, CacheFolder, CheckHash, Inputs, Model, Source, Text
from res2net_jax.decoding import WORKERS, uninterrupted
from res2net_jax.fusion import compile
from res2net_jax.inference import class_names
from res2net_jax.overlay import check_alpha, overlay
from res2net_jax.preprocess import open_picture, picture_setting, preprocess, resize_and_crop

#: Side of the overlays, in pixels.
SIDE = 448


def explain(
    model: Model,
    inputs: Inputs,
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")],
    class_: Annotated[str | None, tyro.conf.arg(name="class", metavar="NAME|INDEX", help_behavior_hint="")] = None,
    stage: Text = None,
    method: Literal["gradcam", "gradcam++"] = "gradcam",
    alpha: float = 0.6,
    force: bool = False,
    strict: bool = False,
    batch_size: BatchSize = 32,
    source: Source = None,
    check_hash: CheckHash = True,
    cache_dir: CacheFolder = None,
) -> int:
    """python -m res2net_jax explain res2net50d photo.jpg holidays/ --output maps --class tabby

    Shows where in pictures the evidence for a class is, as a PNG each: what the model sees of it in grey, and over that
    the map from dark (none) to light, on a scale of its own. A picture that cannot be read is left out and named at the
    end.

    Exit code: 0 done; 1 with --strict, if a picture was left out; 2 a mistake, or no picture can be read; 130
    interrupted.

    Args:
        output: Where the PNGs go; in sub-folders as the pictures are.
        class_: A class's name or index; by default the likeliest of each picture.
        stage: act1 (the stem) or layer1 to layer4; by default the last.
        method: Grad-CAM, or Grad-CAM++, which finds several objects of a class better.
        alpha: Weight of the map over the picture, from 0 to 1.
        force: Replace PNGs that exist.
        strict: Exit with 1 if a picture was left out.
    """
    natural("--batch-size", batch_size, least=1)
    check_alpha(alpha)
    output = output.expanduser()
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output} is not a folder; --output names the folder for the PNGs")
    once = {os.path.abspath(picture): picture for picture in find_pictures(inputs)}
    targets = {picture: output / name for picture, name in png_names([*once.values()]).items()}
    originals = {os.path.realpath(picture) for picture in targets}
    for target in targets.values():
        if os.path.realpath(target) in originals:
            raise ValueError(f"{target} is one of the pictures and would be overwritten; give another --output")
        files.check_new(target, force)

    loaded = hub.load(model, source=source, cache_dir=cache_dir, check_hash=check_hash)
    setting, names = picture_setting(loaded), class_names(loaded)
    stage = explanation.check_stage(loaded, stage)
    chosen = None if class_ is None else find_class(names, class_)
    transform, run = preprocess(setting), compile(loaded)

    def read(path):
        image = open_picture(path)
        return transform(image), resize_and_crop(image, setting, SIDE)

    @uninterrupted
    def look(images):
        """Probabilities, the class and its map, for a padded batch."""
        images = jnp.asarray(stack(images, size))
        probabilities = np.asarray(jax.nn.softmax(run(images).astype(jnp.float32)))
        classes = probabilities.argmax(-1) if chosen is None else np.full(size, chosen)
        heats = explanation.explain(loaded, images, method=method, stage=stage, classes=classes)
        return probabilities[np.arange(size), classes], classes, np.asarray(heats)

    def draw(path, crop, heat):
        with files.new_file(targets[path], overwrite=force, binary=True) as stream:
            overlay(crop, heat, alpha).save(stream, "PNG", compress_level=1)  # photographs get no smaller by more

    size = min(batch_size, len(targets))
    pictures = Pictures(list(targets), read, size)
    with ThreadPoolExecutor(WORKERS) as pool:
        for batch, results in pictures:
            images, crops = zip(*results)
            probabilities, classes, heats = look(images)
            list(pool.map(draw, batch, crops, heats))
            for path, probability, index in zip(batch, probabilities, classes):
                pictures.say(f"{targets[path]}  {probability:.1%}  {names[index]}")
    pictures.report()
    if heats.shape[1:] == (1, 1):
        print(f"a map of {stage} is a single place at this size of picture: choose an earlier --stage", file=sys.stderr)
    return int(strict and bool(pictures.failures))


def png_names(pictures: Sequence[Path]) -> dict[Path, Path]:
    """A relative path for each picture's PNG: its own below the folder that all lie in, ``photo.jpg`` as ``photo.png``.

    Pictures that differ in nothing but their ending keep it: ``photo.jpg.png``.
    """
    names = {
        picture: (path.with_suffix(".png"), path.with_name(f"{path.name}.png"))
        for picture, path in below(pictures).items()
    }
    taken = collections.Counter(name for pair in {*names.values()} for name in {*pair})
    return {picture: short if taken[short] == 1 else long for picture, (short, long) in names.items()}


def find_class(names: Sequence[str], text: str) -> int:
    """The index of the class called ``text``, in full or as one of "tabby, tabby cat"; else ``text`` as an index.

    Raises:
        ValueError: There is none, or there are several.
    """
    wanted = text.strip().casefold()
    for called in (
        lambda name: name.casefold() == wanted,
        lambda name: wanted in [part.strip().casefold() for part in name.split(",")],
    ):
        found = [i for i, name in enumerate(names) if called(name)]
        if len(found) > 1:
            classes = ", ".join(f"{i} ({names[i]})" for i in found)
            raise ValueError(f"several classes are called {text!r}; give the index of one: {classes}")
        if found:
            return found[0]
    if wanted.isdecimal():
        if int(wanted) < len(names):
            return int(wanted)
        raise ValueError(f"there is no class {text}; this model has {len(names)}, from 0 to {len(names) - 1}")
    parts = {part.strip().casefold(): part.strip() for name in names for part in name.split(",")}
    close = [part for part in parts if wanted and wanted in re.split(r"\W", part)]
    close += [part for part in difflib.get_close_matches(wanted, parts, n=3) if part not in close]
    known = f"; known are {', '.join(names)}" if len(names) <= 20 else ""
    hint = f"; did you mean {' or '.join(parts[part] for part in close[:3])}?" if close else known
    raise ValueError(f"no class is called {text!r}, of {len(names)}{hint}")
