"""``explain``: where in pictures the evidence for a class is."""

import collections
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from res2net_jax import explanation, files, hub
from res2net_jax.arch import natural
from res2net_jax.commands.batches import Pictures, stack
from res2net_jax.commands.inputs import below, find_pictures
from res2net_jax.commands.options import Folder, Inputs, Model, Text
from res2net_jax.fusion import compile
from res2net_jax.inference import class_names, picture_setting
from res2net_jax.overlay import check_alpha, overlay
from res2net_jax.preprocess import open_picture, preprocess, resize_and_crop

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
    batch_size: int = 32,
    source: Text = None,
    check_hash: bool = True,
    cache_dir: Folder = None,
) -> int:
    """python -m res2net_jax explain res2net50d photo.jpg holidays/ --output maps --class tabby

    Shows where in pictures the evidence for a class is, as a PNG each: what the model sees of it in grey, and over that
    the map from dark (none) to light, on a scale of its own. A picture that cannot be read is left out and named at the
    end.

    Exit code: 0 done; 1 with --strict, if a picture was left out; 2 a mistake, or no picture can be read; 130
    interrupted.

    Args:
        model: A name, a checkpoint folder, or hf://user/name.
        inputs: Pictures, folders, wildcards in quotes, or - for a list on standard input.
        output: Where the PNGs go; in sub-folders as the pictures are.
        class_: A class's name or index; by default the likeliest of each picture.
        stage: act1 (the stem) or layer1 to layer4; by default the last.
        method: Grad-CAM, or Grad-CAM++, which finds several objects of a class better.
        alpha: Weight of the map over the picture, from 0 to 1.
        force: Replace PNGs that exist.
        strict: Exit with 1 if a picture was left out.
        batch_size: Pictures to run at a time.
        source: For a name, where to take its weights from instead of the release.
        check_hash: Take a source whose SHA-256 does not begin as its file name says.
        cache_dir: Cache folder, by default $RES2NET_JAX_HOME or the platform's own.
    """
    natural("--batch-size", batch_size, least=1)
    check_alpha(alpha)
    targets = {picture: output / name for picture, name in png_names(find_pictures(inputs)).items()}
    for target in targets.values():
        files.check_new(target, force)

    loaded = hub.load(model, source=source, cache_dir=cache_dir, check_hash=check_hash)
    setting, names = picture_setting(loaded), class_names(loaded)
    explanation.check_stage(loaded, stage)
    chosen = None if class_ is None else find_class(names, class_)
    transform, run = preprocess(setting), compile(loaded)

    def read(path):
        image = open_picture(path)
        return transform(image), resize_and_crop(image, setting, SIDE)

    size = min(batch_size, len(targets))
    pictures = Pictures(list(targets), read, size)
    for batch, results in pictures:
        images, crops = zip(*results)
        images = jnp.asarray(stack(images, size))
        probabilities = np.asarray(jax.nn.softmax(run(images).astype(jnp.float32)))
        classes = probabilities.argmax(-1) if chosen is None else np.full(size, chosen)
        heats = np.asarray(explanation.explain(loaded, images, method=method, stage=stage, classes=classes))
        for i, path in enumerate(batch):
            with files.new_file(targets[path], overwrite=force, binary=True) as stream:
                overlay(crops[i], heats[i], alpha).save(stream, "PNG")
            pictures.say(f"{targets[path]}  {probabilities[i, classes[i]]:.1%}  {names[classes[i]]}")
    pictures.report()
    return int(strict and bool(pictures.failures))


def png_names(pictures: Sequence[Path]) -> dict[Path, Path]:
    """A relative path for each picture's PNG: its own below the folder that all lie in, ``photo.jpg`` as ``photo.png``.

    Pictures that differ in nothing but their ending keep it: ``photo.jpg.png``.
    """
    paths = below(pictures)
    taken = collections.Counter(path.with_suffix(".png") for path in {*paths.values()})
    return {
        picture: path.with_suffix(".png")
        if taken[path.with_suffix(".png")] == 1
        else path.with_name(f"{path.name}.png")
        for picture, path in paths.items()
    }


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
    parts = {part.strip(): i for i, name in enumerate(names) for part in name.split(",")}
    close = difflib.get_close_matches(text, parts, n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(f"no class is called {text!r}, of {len(names)}{hint}")
