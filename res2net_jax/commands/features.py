"""``features``: pictures to arrays."""

import json as json_
import sys
from pathlib import Path
from typing import Annotated

import tyro

from res2net_jax import extraction, hub
from res2net_jax.commands.inputs import find_pictures
from res2net_jax.commands.options import BatchSize, CacheFolder, CheckHash, Inputs, Model, Source, Text
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
    batch_size: BatchSize = 32,
    source: Source = None,
    check_hash: CheckHash = True,
    cache_dir: CacheFolder = None,
) -> int:
    """python -m res2net_jax features res2net50d holidays/ --output holidays.npy

    Writes the features of pictures, one row per picture, in the order of the files. A run that was cut off continues
    when it is repeated, to the same bytes (on a GPU, to rounding). A picture that cannot be read is a row of NaN, and
    named at the end.

    Exit code: 0 done; 1 with --strict, if a picture cannot be read; 2 a mistake, or no picture can be read; 130
    interrupted.

    Args:
        output: FILE.npy, with FILE.json beside it that names the pictures; or FILE.npz, which holds both.
        stage: act1 (the stem) or layer1 to layer4; by default what the classifier sees.
        maps: Whole maps instead of pooled ones.
        json: Print the file and the pictures that cannot be read as an object.
        force: Replace a file that exists, and start anew where other pictures or settings were begun.
        strict: Exit with 1 if a picture cannot be read.
    """
    pictures = find_pictures(inputs)
    check_target(output, force)
    loaded = hub.load(model, source=source, cache_dir=cache_dir, check_hash=check_hash)
    options = {"pool": not maps, "batch_size": batch_size, "overwrite": force}
    unreadable = extraction.save_features(loaded, pictures, output, stage, **options)
    print(json_.dumps({"file": str(output), "unreadable": unreadable}) if json else output)
    if unreadable:
        count = f"{len(unreadable):,} of {len(pictures):,} pictures"
        lines = "\n".join(f"  {reason}" for reason in unreadable.values())
        print(f"{count} could not be read; their rows are NaN:\n{lines}", file=sys.stderr)
    return int(strict and bool(unreadable))
