"""``features``: pictures to arrays."""

import json as json_
import sys
from pathlib import Path
from typing import Annotated

import tyro

from res2net_jax import extraction, hub
from res2net_jax.commands.inputs import find_pictures
from res2net_jax.commands.options import Folder, Inputs, Model, Text
from res2net_jax.feature_file import check_target


def features(
    model: Model,
    inputs: Inputs,
    output: Annotated[Path, tyro.conf.arg(metavar="FILE")],
    stage: Text = None,
    maps: bool = False,
    json: bool = False,
    force: bool = False,
    strict: bool = False,
    batch_size: int = 32,
    source: Text = None,
    check_hash: bool = True,
    cache_dir: Folder = None,
) -> int:
    """python -m res2net_jax features res2net50d holidays/ --output holidays.npy

    Writes the features of pictures, a row a picture, in the order of the files. A run that was cut off goes on when it
    is repeated, to the same bytes. A picture that cannot be read is a row of NaN, and named at the end.

    Exit code: 0 done; 1 with --strict, if a picture cannot be read; 2 a mistake; 130 interrupted.

    Args:
        model: A name, a checkpoint folder, or hf://user/name.
        inputs: Pictures, folders, wildcards in quotes, or - for a list on standard input.
        output: FILE.npy, with FILE.json beside it that names the pictures; or FILE.npz, which holds both.
        stage: act1 (the stem) or layer1 to layer4; by default what the classifier sees.
        maps: Whole maps instead of pooled ones.
        json: Print the file and the pictures that cannot be read as an object.
        force: Replace a file that exists, and start anew where other pictures or settings were begun.
        strict: Exit with 1 if a picture cannot be read.
        batch_size: Pictures to run at a time.
        source: For a name, where to take its weights from instead of the release.
        check_hash: Take a source whose SHA-256 does not begin as its file name says.
        cache_dir: Cache folder, by default $RES2NET_JAX_HOME or the platform's own.
    """
    pictures = find_pictures(inputs)
    check_target(output, force)
    loaded = hub.load(model, source=source, cache_dir=cache_dir, check_hash=check_hash)
    options = {"pool": not maps, "batch_size": batch_size, "overwrite": force}
    unreadable = extraction.save_features(loaded, pictures, output, stage, **options)
    print(json_.dumps({"file": str(output), "unreadable": unreadable}) if json else output)
    if unreadable:
        lines = "\n".join(f"  {reason}" for reason in unreadable.values())
        count = f"{len(unreadable):,} of {len(pictures):,} pictures"
        print(f"{count} could not be read; their rows are NaN:\n{lines}", file=sys.stderr)
    return int(strict and bool(unreadable))
