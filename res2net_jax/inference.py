"""From a model and pictures to answers."""

import functools
import importlib.resources
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from res2net_jax.checks import natural
from res2net_jax.fusion import compiled
from res2net_jax.init import require_model
from res2net_jax.model import Res2Net
from res2net_jax.preprocess import Picture, preprocess

_MOST = 20  # of a normalised image's values, which as a rule lie within 3


class Prediction(NamedTuple):
    """One class and how sure the model is of it."""

    label: str
    probability: float
    index: int


def classify(
    model: Res2Net,
    images: Picture | Sequence[Picture] | jax.Array | np.ndarray,
    top_k: int = 5,
    *,
    batch_size: int = 32,
) -> list[Prediction] | list[list[Prediction]]:
    """The ``top_k`` likeliest classes of each picture, likeliest first.

    The first call compiles the model (:func:`res2net_jax.compile`) and keeps that, a second copy of most weights, as
    long as the model lives and keeps its weights.

    Args:
        model: In eval mode, for RGB pictures.
        images: Pictures (paths, bytes, PIL images, or uint8 arrays [h, w, c]), or an array [b, h, w, c]: in uint8 of
            pictures, else of images that are normalised already. A single picture gives a single answer.
        top_k: Classes to return; at most all of them.
        batch_size: Pictures to run at a time.

    Raises:
        ValueError: No pictures, one that cannot be read, or a model in train mode or without classifier.
        FileNotFoundError: A picture that is not there.
    """
    require_model(model)
    names = class_names(model)
    top_k = min(natural("top_k", top_k, least=1), model.num_classes)
    batch_size = natural("batch_size", batch_size, least=1)
    is_array = isinstance(images, jax.Array | np.ndarray)
    if is_array and images.dtype == np.uint8:
        is_array = False
        images = list(images) if images.ndim == 4 else images
    single = isinstance(images, Picture) and not is_array
    if single:
        images = [images]
    if not is_array and not isinstance(images, Sequence):
        raise TypeError(f"expected pictures, a list of pictures, or an array; got {type(images).__name__}")
    if len(images) == 0:
        raise ValueError("there are no images to classify")
    if is_array:
        model.check_images(images)
        if isinstance(images, np.ndarray) and (most := images[:batch_size].max(initial=0)) > _MOST:
            warnings.warn(
                f"these images have values up to {most:g}, which normalised ones do not; pass pictures of 0 to 255 as "
                "uint8, or through res2net_jax.preprocess(model)",
                stacklevel=2,
            )
    transform = None if is_array else preprocess(model)
    run, answers = compiled(model), []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        if transform is not None:
            batch = np.stack([transform(picture) for picture in batch])
        padding = min(batch_size, len(images)) - len(batch)  # the last batch as large as the others: one compilation
        padded = np.pad(batch, ((0, padding), (0, 0), (0, 0), (0, 0))) if padding else batch
        answers += likeliest(run(jnp.asarray(padded))[: len(batch)], names, top_k)
    return answers[0] if single else answers


def likeliest(logits: Float[Array, "b k"], names: Sequence[str], top_k: int) -> list[list[Prediction]]:
    """The ``top_k`` likeliest classes of each row of ``logits``, likeliest first."""
    if logits.shape[-1] != len(names):
        raise ValueError(
            f"this model gives {logits.shape[-1]} values per image, and is said to have {len(names)} classes; "
            "model.reset_classifier(N) replaces a classifier"
        )
    return _name(names, *_top(logits, top_k))


def class_names(model: Res2Net) -> tuple[str, ...]:
    """One name per class: the model's own, else ImageNet's (WordNet lemmas), else ``"class 0"`` and so on."""
    if not model.num_classes:
        raise ValueError("this model has no classifier (num_classes=0), so it names no classes")
    if model.class_names is not None:
        return model.class_names
    names = tuple(name for _, name in imagenet_classes())
    return names if model.num_classes == len(names) else tuple(f"class {i}" for i in range(model.num_classes))


@functools.cache
def imagenet_classes() -> tuple[tuple[str, str], ...]:
    """(WordNet synset, names) of the 1000 ImageNet classes, in the order of the classifier."""
    text = importlib.resources.files("res2net_jax").joinpath("imagenet_classes.tsv").read_text("utf-8")
    return tuple(tuple(line.split("\t")) for line in text.splitlines())


def _name(names, probabilities, indices):
    rows = zip(np.asarray(probabilities).tolist(), np.asarray(indices).tolist())
    return [[Prediction(names[i], p, i) for p, i in zip(*row)] for row in rows]


@functools.partial(jax.jit, static_argnums=1)
def _top(logits, k):
    return jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), k)
