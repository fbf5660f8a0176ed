"""--dry-run and --fake-data: what a run would be, without running it."""

import time
from collections.abc import Callable

import jax
import numpy as np

from res2net_jax.cost import count_parameters
from res2net_jax.model import Res2Net
from train.config import Config
from train.data import train_batches
from train.datasets import Dataset
from train.optimizer import learning_rate
from train.sources import Arrays
from train.step import State, evaluated, zero_sums

FAKE_CLASSES = 1000
WARM_UP, TIMED = 5, 50


def fake_dataset() -> Dataset:
    """A data set of as many black pictures as ImageNet's training split has, for shapes and step counts alone."""
    count = 1_281_167
    images = np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (count, 1, 1, 3))
    return Dataset("fake data", "train", Arrays("fake data", images, np.zeros(count, np.int32)), FAKE_CLASSES)


def dry_run(
    config: Config,
    model: Res2Net,
    state: State,
    train_step: jax.stages.Wrapped,
    eval_step: jax.stages.Wrapped,
    place: Callable[[dict], dict],
    dataset: Dataset,
    steps_per_epoch: int,
) -> None:
    """Compiles both steps and prints parameters, memory, steps, learning rates and the shapes of a batch."""
    batch = place(_first_batch(config, dataset))
    memory = train_step.lower(state, batch).compile().memory_analysis()
    count = config.eval_images // jax.process_count()
    pixels = np.zeros((count, *batch["image"].shape[1:]), np.uint8)
    held_out = place({"image": pixels, "label": np.zeros(count, np.int32), "mask": np.zeros(count, bool)})
    sums = jax.eval_shape(lambda: zero_sums(config))
    evaluation = eval_step.lower(evaluated(state), held_out, sums).compile().memory_analysis()
    if jax.process_index() > 0:
        return
    print(f"model          {model.name}, {count_parameters(model):,} parameters, {model.num_classes} classes")
    print(f"data           {dataset.name}[{dataset.split}], {len(dataset):,} pictures")
    print(f"steps          {steps_per_epoch:,} an epoch, {config.epochs * steps_per_epoch:,} in {config.epochs} epochs")
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {jax.process_count()} process(es)"
    print(f"devices        {devices}, {config.batch_size // jax.device_count()} images each")
    for name, of in {"memory": memory, "to evaluate": evaluation}.items():
        # Outputs of training lie in the donated arguments, and those of an evaluation are small, so they add nothing.
        held = of.argument_size_in_bytes + of.temp_size_in_bytes + of.generated_code_size_in_bytes
        print(
            f"{name:14} {_mebibytes(held)} a device: {_mebibytes(of.argument_size_in_bytes)} of state and batch, "
            f"{_mebibytes(of.temp_size_in_bytes)} in passing"
        )
    print("learning rate")
    for epoch in _milestones(config):
        lr = float(learning_rate(config, round(epoch * steps_per_epoch), steps_per_epoch))
        print(f"  epoch {epoch:6.1f}  {lr:10.6f}  {'#' * round(60 * lr / config.peak_lr)}")
    print("batch")
    for name, array in batch.items():
        print(f"  {name:6} {array.dtype} {list(array.shape)}, {list(array.sharding.shard_shape(array.shape))} a device")


def time_steps(config: Config, state: State, train_step: jax.stages.Wrapped, place: Callable[[dict], dict]) -> None:
    """Prints the speed of the step on random images that are already in the host's memory."""
    rng = np.random.default_rng(config.seed)
    count = config.batch_size // jax.process_count()
    batch = {
        "image": rng.integers(0, 256, (count, config.size, config.size, 3), np.uint8),
        "label": rng.integers(0, FAKE_CLASSES, count).astype(np.int32),
    }
    steps = config.steps or TIMED
    began = time.perf_counter()
    state, metrics = train_step(state, place(batch))
    jax.block_until_ready(metrics)
    print(f"first step, compiled or read from the cache: {time.perf_counter() - began:.1f} s")
    for _ in range(WARM_UP):
        state, metrics = train_step(state, place(batch))
    jax.block_until_ready(metrics)
    began = time.perf_counter()
    for _ in range(steps):
        before = metrics
        state, metrics = train_step(state, place(batch))
        jax.block_until_ready(before)
    jax.block_until_ready(metrics)
    seconds = time.perf_counter() - began
    print(
        f"{steps} steps: {1000 * seconds / steps:.1f} ms a step, {steps * config.batch_size / seconds:.0f} images/s "
        f"on {jax.device_count()} x {jax.devices()[0].device_kind}"
    )


def _first_batch(config, dataset):
    batches = train_batches(
        dataset,
        size=config.size,
        batch_size=config.batch_size // jax.process_count(),
        seed=config.seed,
        augment=config.augment,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    try:
        return next(batches)
    finally:
        batches.close()


def _milestones(config):
    warmup = [config.warmup_epochs / 2] if config.warmup_epochs else []
    if config.schedule == "steps":
        drops = [epoch for epoch in range(config.decay_epochs, config.epochs, config.decay_epochs)]
        return sorted({0, *warmup, *([config.warmup_epochs] if warmup else []), *drops, config.epochs - 1})
    rest = config.epochs - config.warmup_epochs
    return [0, *warmup, *(config.warmup_epochs + rest * tenth / 10 for tenth in range(10)), config.epochs - 0.1]


def _mebibytes(size):
    return f"{size / 2**20:,.0f} MiB"
