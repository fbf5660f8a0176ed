"""``features``: pictures to arrays."""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from res2net_jax import extraction, hub
from res2net_jax.commands.inputs import find_pictures


def features(
    model: Annotated[str, tyro.conf.Positional],
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional],
    output: Path,
    stage: str | None = None,
    maps: bool = False,
    batch_size: int = 32,
    strict: bool = False,
    force: bool = False,
    cache_dir: Path | None = None,
) -> None:
    """Writes the features of pictures, a row a picture, e.g. features res2net50_26w_4s photos --output photos.npy

    A run that was cut off goes on when it is repeated. Pictures that cannot be read are NaN, and named at the end.

    Args:
        model: A name, a checkpoint folder, or hf://user/name.
        inputs: Pictures, folders, wildcards in quotes, or - for a list on standard input.
        output: FILE.npy, with FILE.json beside it that names the pictures; or FILE.npz, which holds both.
        stage: Of this stage (act1, layer1, ...), by default of the last.
        maps: Whole maps instead of pooled ones.
        batch_size: Pictures to run at a time.
        strict: Exit with 1 if there was a picture that cannot be read.
        force: Replace a file that exists, and start anew where other pictures or settings were begun.
        cache_dir: Cache folder, by default $RES2NET_JAX_HOME or the platform's own.
    """
    pictures = find_pictures(inputs)
    loaded = hub.load(model, cache_dir=cache_dir)
    options = {"pool": not maps, "batch_size": batch_size, "overwrite": force}
    unreadable = extraction.save_features(loaded, pictures, output, stage, **options)
    print(output)
    for reason in unreadable.values():
        print(f"not read: {reason}", file=sys.stderr)
    if unreadable:
        print(f"{len(unreadable)} of {len(pictures)} pictures could not be read; their rows are NaN", file=sys.stderr)
        sys.exit(1 if strict else 0)
