"""``predict``: what is in pictures."""

from pathlib import Path
from typing import Annotated

import tyro

from res2net_jax import hub, inference
from res2net_jax.commands.inputs import find_pictures


def predict(
    model: Annotated[str, tyro.conf.Positional],
    files: Annotated[tuple[str, ...], tyro.conf.Positional],
    top_k: int = 5,
    source: str | None = None,
    check_hash: bool = True,
    cache_dir: Path | None = None,
) -> None:
    """Names what is in pictures.

    Args:
        model: A name or a checkpoint folder.
        files: Pictures, folders, wildcards in quotes, or - for a list on standard input.
        top_k: Classes to show.
        source: For a name, where to take its weights from instead of the release.
        check_hash: Compare the source's SHA-256 with the prefix in its file name.
        cache_dir: Cache folder, by default $RES2NET_JAX_HOME or the platform's own.
    """
    files = find_pictures(files)
    loaded = hub.load(model, source=source, cache_dir=cache_dir, check_hash=check_hash)
    for file, predictions in zip(files, inference.classify(loaded, files, top_k)):
        print(file)
        for prediction in predictions:
            print(f"  {prediction.probability:6.1%}  {prediction.label}")
