"""Features instead of logits: of images in memory, or of any number of picture files to a file."""

import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

from res2net_jax import files
from res2net_jax.checks import natural
from res2net_jax.decoding import decoded, uninterrupted
from res2net_jax.explanation import check_stage
from res2net_jax.feature_file import FeatureFile, check_target, stamp
from res2net_jax.fusion import compile_function
from res2net_jax.init import require_model, variables
from res2net_jax.model import Res2Net
from res2net_jax.pooling import global_pool
from res2net_jax.preprocess import picture_setting, preprocess


def feature_extractor(
    model: Res2Net, stage: str | None = None, *, pool: bool = True
) -> Callable[[Float[Array, "b h w c"]], Float[Array, "b ..."]]:
    """The fast way to a model's features; made as :func:`res2net_jax.compile` makes it for the logits.

    Args:
        model: In eval mode. Later changes of its weights have no effect.
        stage: ``"layer3"``, say, of ``model.feature_info``; ``"act1"`` is the stem before its pooling. By default
            the last one.
        pool: Pool the stage's maps as the model pools its last ones (by the mean if it does not), to [b, f]: for the
            last stage what the classifier sees. Otherwise the maps [b, h, w, f] are given whole.

    Returns:
        Normalised images [b, h, w, c] -> features, in the model's computation type.

    Raises:
        ValueError: No such stage, or a model in train mode.
        TypeError: No model.
    """
    return compile_function(_features(model, stage, pool), model)


def save_features(
    model: Res2Net,
    pictures: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    stage: str | None = None,
    *,
    pool: bool = True,
    batch_size: int = 32,
    overwrite: bool = False,
) -> dict[str, str]:
    """Writes the features of picture files, one row per file, to ``output``.

    A run that was cut off, by ``kill -9`` too, continues when it is repeated, and writes the same bytes (on a GPU,
    whose libraries choose their algorithms anew each time, the same to rounding). Memory does not grow with the number
    of pictures, but for their names. Rows are float32; that of a picture that cannot be read is NaN, and tried again
    when the run continues.

    Args:
        model: In eval mode, for RGB pictures.
        pictures: Paths; or one.
        output: ``.npy``, with a ``.json`` beside it that names the files; or ``.npz``, with arrays ``features`` and
            ``files``, which needs twice the space while it is written.
        stage: As for :func:`feature_extractor`.
        pool: As for :func:`feature_extractor`.
        batch_size: Pictures to run at a time.
        overwrite: Replace ``output``, and forget an unfinished run of other pictures or settings.

    Returns:
        The pictures that could not be read, and why.

    Raises:
        ValueError: No pictures or none that can be read, no such stage, another suffix, or an unfinished run of other
            settings or pictures, one of which may have been replaced since.
        FileExistsError: ``output`` is there.
        OSError: No permission, no space.
    """
    output = Path(output).expanduser().absolute()
    check_target(output, overwrite)
    pictures = [pictures] if isinstance(pictures, str | os.PathLike) else pictures
    names = [os.fspath(picture) for picture in pictures]
    if not names:
        raise ValueError("there are no pictures to take features of")
    batch_size = natural("batch_size", batch_size, least=1)
    require_model(model)
    setting = picture_setting(model)
    blank = np.zeros((batch_size, setting.size, setting.size, model.in_chans), np.float32)
    extract = feature_extractor(model, stage, pool=pool)
    run = uninterrupted(lambda images: np.array(extract(images), np.float32))
    shape = jax.eval_shape(lambda images: _features(model, stage, pool)(model, images), blank).shape[1:]
    settings = {
        "model": model.name,
        "weights": _fingerprint(model),
        "stage": check_stage(model, stage),
        "pool": pool,
        "dtype": str(model.dtype),
        "preprocessing": repr(setting),
        "batch_size": batch_size,
        "jax": f"{jax.__version__}, {jax.default_backend()}",
    }
    transform = preprocess(setting)

    def read(name):
        before = stamp(name)
        return before, transform(name)

    with files.lock(output):
        file = FeatureFile(output, names, shape, settings, overwrite=overwrite)
        todo = [] if file.finished else [*file.again, *range(file.rows, len(names))]
        images = decoded((names[row] for row in todo), read, ahead=2 * batch_size)
        with tqdm(total=len(names), initial=len(names) - len(todo), unit="picture", disable=None) as bar:
            for _, batch in itertools.groupby(zip(todo, images), lambda found: found[0] // batch_size):
                pictures = {}
                inputs = blank.copy()  # always as large, for one compilation
                for row, found in batch:
                    if isinstance(found, Exception):
                        pictures[row] = str(found)
                    else:  # at its place, also if it was alone in being tried again: for the same bytes
                        pictures[row], inputs[row % batch_size] = found
                rows = run(inputs)[[row % batch_size for row in pictures]]
                rows[[isinstance(state, str) for state in pictures.values()]] = np.nan
                file.write(rows, pictures)
                bar.update(len(pictures))
        if len(file.unreadable) == len(names) and not file.finished:
            file.discard()
            reasons = "\n".join(f"  {reason}" for reason in file.unreadable.values())
            raise ValueError(f"no picture can be read, so {output} was not written:\n{reasons}")
        if not file.finished:
            file.finish()
    return {names[row]: reason for row, reason in file.unreadable.items()}


def _features(model, stage, pool):
    require_model(model)
    stages = model.feature_info.module_name()
    return _features_of(stages.index(check_stage(model, stage)), pool)


@functools.cache  # for the programs of one function are kept, not those of equal ones
def _features_of(index, pool):
    def features(model, images):
        _, (maps,) = model.forward_intermediates(images, [index], stop_early=True)
        return global_pool(maps, model.arch.global_pool or "avg") if pool else maps

    return features


def _fingerprint(model):
    digest = hashlib.sha256(repr(dataclasses.astuple(model.arch)).encode())
    for path, leaf in sorted(variables(model).items()):
        digest.update(path.encode() + np.asarray(leaf.get_value()).tobytes())
    return digest.hexdigest()
