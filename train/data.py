"""Batches of pictures for training and evaluation: Grain pipelines over a :class:`train.datasets.Dataset`.

What a batch holds depends on the seed, the global batch size and the number of the step, and on nothing
else: not on how many workers decode it, nor on how many processes share it. So a position in the data is
the number of the next step, and a run may resume with other workers or processes.
"""

import dataclasses
import functools
import importlib.util
import math
from typing import Any, Literal

import numpy as np

from res2net_jax.preprocess import resize_and_crop
from res2net_jax.variants import Preprocessing
from train import transforms
from train.datasets import Dataset
from train.pipeline import Batches
from train.transforms import UnreadablePicture

# So many unreadable pictures in a row are no accident.
_MAX_UNREADABLE = 32


@dataclasses.dataclass(frozen=True)
class Augment:
    """What the host does to a training picture. The defaults are the official recipe."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop, as a part of the picture's."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width / height of the random crop."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    color_jitter: float = 0.0
    """Strength of random changes of brightness, contrast and saturation, e.g. 0.4; 0 is none."""
    rand_augment: int | None = None
    """Magnitude of RandAugment, 0..30, 9 in its paper; None is none."""

    resizer: Literal["pillow", "simd"] = "pillow"
    """Pillow, or the faster cykooz.resizer, which is at most one grey level from it."""

    def __post_init__(self):
        if self.resizer not in transforms.RESIZERS:
            raise ValueError(f"--resizer must be {' or '.join(transforms.RESIZERS)}; got {self.resizer!r}")
        if self.resizer == "simd" and importlib.util.find_spec("cykooz_resizer") is None:
            raise ValueError("--resizer simd needs a package: pip install cykooz.resizer; pillow needs nothing more")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"--crop-scale must be two rising numbers in (0, 1]; got {self.crop_scale}")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1] < math.inf:
            raise ValueError(f"--crop-ratio must be two rising positive numbers; got {self.crop_ratio}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"--flip must be a probability; got {self.flip}")
        if not 0 <= self.color_jitter < math.inf:
            raise ValueError(f"--color-jitter must be a number from 0 up; got {self.color_jitter}")
        if self.rand_augment is not None and not 0 <= self.rand_augment <= 30:
            raise ValueError(f"--rand-augment must be 0..30 or None; got {self.rand_augment}")


def train_batches(
    dataset: Dataset,
    *,
    size: int,
    batch_size: int,
    seed: int,
    augment: Augment = Augment(),
    interpolation: str = "bilinear",
    start: int = 0,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """An endless iterator over training batches of this process.

    Every epoch is a new random order of the whole set, without the few examples left over by the last full
    global batch. Global step *k* holds the same examples, distorted the same way, for any number of
    processes; their shares follow one another in the order of ``process_index``.

    A picture that cannot be read is named on stderr, replaced by the next one of the set that can,
    and counted in :attr:`Batches.replaced`.

    Args:
        size: Side of the pictures that come out.
        batch_size: Examples of one process in one step.
        seed: Of the order and the distortions, 0..2**32 - 1.
        augment: Distortions.
        interpolation: ``bilinear``, ``bicubic`` or ``nearest``.
        start: Number of the first step.
        workers: Processes that decode. With 0, threads of this one do.
        process_index: Which of the processes that share each global batch this is.
        process_count: How many they are.

    Yields:
        ``{"image": uint8 [b, size, size, c], "label": int32 [b]}``.

    Raises:
        ValueError: Fewer pictures than one global batch, a multi-label set, or an option out of its range.
    """
    steps = steps_per_epoch(dataset, batch_size * process_count)
    if dataset.multi_label:
        raise ValueError(f"{dataset.name} gives several labels to one picture; it is for evaluation only")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in 0..2**32 - 1; got {seed}")
    if interpolation not in transforms.RESAMPLING:
        raise ValueError(f"interpolation must be {' or '.join(transforms.RESAMPLING)}; got {interpolation!r}")
    example = _TrainExample(dataset, size, seed, augment, interpolation, steps * batch_size * process_count)
    endless = 2**50 // batch_size * batch_size
    share = process_index, process_count
    values = size**2 * dataset.in_chans
    return Batches(example, endless, batch_size, start, workers, *share, example.describe, example_bytes=values)


def eval_batches(
    dataset: Dataset,
    *,
    preprocessing: Preprocessing,
    batch_size: int,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """An iterator that gives every example exactly once, over all the processes together.

    All processes get the same number of batches, all of one shape; what is missing from the last one is
    black pictures whose ``mask`` is False and whose label is -1.

    Args:
        preprocessing: Size, crop and interpolation; mean and standard deviation are for the device.
        batch_size: Examples of one process in one step.
        workers: Processes that decode. With 0, threads of this one do.
        process_index: Which of the processes that share each global batch this is.
        process_count: How many they are.

    Yields:
        ``{"image": uint8 [b, size, size, c], "label": int32 [b], "mask": bool [b]}``. The label of a
        multi-label set is bool [b, num_classes].

    Raises:
        UnreadablePicture: While iterating; an accuracy without that picture would be wrong.
    """
    steps = -(-len(dataset) // max(1, batch_size * process_count))
    length = steps * batch_size * process_count
    example, share = _EvalExample(dataset, preprocessing), (process_index, process_count)
    values = preprocessing.size**2 * dataset.in_chans
    return Batches(example, length, batch_size, 0, workers, *share, example_bytes=values)


def steps_per_epoch(dataset: Dataset, global_batch: int) -> int:
    """Full global batches in one pass over ``dataset``; ValueError if there is none."""
    if global_batch < 1:
        raise ValueError(f"the batch must have at least one example; got {global_batch}")
    if len(dataset) < global_batch:
        raise ValueError(
            f"{dataset.name}[{dataset.split}] has {len(dataset)} examples, fewer than one global batch of "
            f"{global_batch}; choose a batch of at most {len(dataset)}"
        )
    return len(dataset) // global_batch


@dataclasses.dataclass(frozen=True)
class _TrainExample:
    """Number *g* in the endless sequence of training examples -> the example."""

    dataset: Dataset
    size: int
    seed: int
    augment: Augment
    interpolation: str
    epoch_size: int

    def __call__(self, g: int) -> dict[str, Any]:
        epoch, position = divmod(g, self.epoch_size)
        n = len(self.dataset)
        index = first = int(_order(n, self.seed, epoch)[position])
        # Counter-based: the random numbers of example g are the same wherever and whenever it is made.
        rng = np.random.Generator(np.random.Philox(key=[self.seed, g]))
        for _ in range(min(n, _MAX_UNREADABLE)):
            try:
                record = self.dataset.source[index]
                image = self.distort(transforms.open_picture(record["image"], self.dataset.upright), rng)
                unreadable = -1 if index == first else first
                return {"image": image, "label": _label(self.dataset, record), "unreadable": unreadable}
            except (UnreadablePicture, OSError) as error:
                index, reason = (index + 1) % n, error
        raise UnreadablePicture(
            f"{min(n, _MAX_UNREADABLE)} pictures in a row cannot be read, from {self.dataset.source.name(first)} on "
            f"({reason}); is {self.dataset.name} what it should be?"
        )

    def describe(self, index: int) -> str:
        """The name of a picture, and what is wrong with it."""
        name = self.dataset.source.name(index)
        try:
            image = self.dataset.source[index]["image"]
            transforms.decode(transforms.open_picture(image, self.dataset.upright), self.dataset.in_chans)
        except (UnreadablePicture, OSError) as error:
            return f"{name}: {error}"
        return name

    def distort(self, picture, rng):
        augment, in_chans = self.augment, self.dataset.in_chans
        box = transforms.random_resized_crop_box(rng, *picture.size, augment.crop_scale, augment.crop_ratio)
        picture = transforms.crop_and_resize(picture, box, self.size, self.interpolation, in_chans, augment.resizer)
        if rng.uniform() < augment.flip:
            picture = transforms.horizontal_flip(picture)
        if augment.rand_augment is not None:
            picture = transforms.rand_augment(rng, picture, augment.rand_augment)
        if augment.color_jitter:
            picture = transforms.color_jitter(rng, picture, augment.color_jitter)
        return np.asarray(picture).reshape(self.size, self.size, in_chans)


@dataclasses.dataclass(frozen=True)
class _EvalExample:
    """Number *i* of the evaluation -> the example, or padding beyond the last."""

    dataset: Dataset
    preprocessing: Preprocessing

    def __call__(self, i: int) -> dict[str, Any]:
        size, in_chans = self.preprocessing.size, self.dataset.in_chans
        if i >= len(self.dataset):
            image, label = np.zeros((size, size, in_chans), np.uint8), np.int32(-1)
            if self.dataset.multi_label:
                label = np.zeros(self.dataset.num_classes, bool)
            return {"image": image, "label": label, "mask": False}
        try:
            record = self.dataset.source[i]
            pixels = transforms.decode(transforms.open_picture(record["image"], self.dataset.upright), in_chans)
        except (UnreadablePicture, OSError) as error:
            raise UnreadablePicture(
                f"{self.dataset.source.name(i)} cannot be read ({error}); "
                "the accuracy without it would be another one, so the evaluation stops"
            ) from error
        image = np.asarray(resize_and_crop(pixels, self.preprocessing, size)).reshape(size, size, in_chans)
        return {"image": image, "label": _label(self.dataset, record), "mask": True}


@functools.lru_cache(maxsize=2)  # workers read ahead, into the epoch after
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The examples of an epoch in random order, int32 [n]. Kept, it saves Grain's index_shuffle, 0.07 ms a picture."""
    # Of raw bits, which are the same in every version of NumPy; those of Generator.permutation need not be.
    bits = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(n)
    return np.argsort(bits, kind="stable").astype(np.int32)


def _label(dataset, record):
    """int32, or for a multi-label set bool [num_classes]; ValueError for a label outside the classes."""
    label = record["label"]
    labels = label if isinstance(label, tuple) else (label,)
    if not all(0 <= value < dataset.num_classes for value in labels):
        raise ValueError(
            f"{dataset.name} has a picture with label {label}; it has classes 0..{dataset.num_classes - 1}"
        )
    if dataset.multi_label:
        return np.isin(np.arange(dataset.num_classes), labels)
    return np.int32(label)
