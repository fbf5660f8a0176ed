"""Top-1 and top-5 accuracy: python -m train.evaluate --model NAME|FOLDER --dataset NAME

Every example counts exactly once, on any number of devices and processes. The result is printed beside
the published one and becomes a row of a CSV file with the columns of timm's result tables.
"""

if __name__ == "__main__":  # which starts anew, so before the imports
    from train.extra import require_extra
    from train.huge_pages import use_huge_pages

    require_extra("train.evaluate")
    use_huge_pages("train.evaluate")

import csv
import dataclasses
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from res2net_jax import command_line
from res2net_jax.backend import compiler_options, use_compilation_cache
from res2net_jax.cost import count_parameters
from res2net_jax.files import writing
from res2net_jax.model import Res2Net
from res2net_jax.variants import VARIANTS, Accuracy, Preprocessing
from train import devices, imagenet_subsets, metrics
from train.augment import normalise
from train.data import eval_batches
from train.datasets import Dataset, open_dataset
from train.start import load_model, preprocessing_of, require_agreement, require_same_weights

COLUMNS = ("model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation")

# Data set -> the published accuracy of it, an attribute of a Variant.
_PUBLISHED = {
    "imagenet2012": "imagenet",
    "imagenet2012_real": "imagenet_real",
    "imagenet_v2": "imagenet_v2",
    "imagenet_v2/matched-frequency": "imagenet_v2",
    "imagenet_a": "imagenet_a",
    "imagenet_r": "imagenet_r",
    "imagenet_sketch": "imagenet_sketch",
}

# A folder does not say which set it is, but if it is whole, the number of its pictures and its classes do.
_COMPLETE = {
    (50_000, None): "imagenet",
    (50_889, None): "imagenet_sketch",
    (7_500, imagenet_subsets.IMAGENET_A): "imagenet_a",
    (30_000, imagenet_subsets.IMAGENET_R): "imagenet_r",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure a model's top-1 and top-5 accuracy."""

    model: str
    """A model's name, or a checkpoint folder (res2net_jax.save, python -m porting, or a run's checkpoints)."""
    dataset: str = "imagenet2012"
    """imagenet2012, imagenet2012_real, imagenet_v2, imagenet_a, imagenet_r, imagenet_sketch, any other TFDS
    classification set, "folder:DIR" (one sub-folder per class), or "digits"."""
    split: str = "validation"
    """validation, test or train, or a part: of a TFDS set as "validation[:1000]", of a folder as "all[80%:]"."""
    data_dir: str | None = None
    """Where TFDS keeps its data sets."""
    size: int | None = None
    """Side of the images, instead of the model's own setting."""
    crop_pct: float | None = None
    """Share of the shorter side that is cropped, instead of the model's own setting."""
    batch_size: int = 256
    """Images at a time, over all devices and processes."""
    workers: int = 0
    """Processes that decode pictures, beside each process of the run; 0 uses threads."""
    csv: str | None = None
    """File to append the result to; by default results-DATASET.csv, of another split than the held-out one
    results-DATASET-SPLIT.csv."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where the cluster does not say (TPU pods, Slurm and Open MPI do)."""
    num_processes: int | None = None
    """Number of processes, with --coordinator."""
    process_id: int | None = None
    """Number of this process, with --coordinator."""


def evaluate(
    model: Res2Net,
    dataset: Dataset,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 256,
    workers: int = 0,
) -> dict[str, int]:
    """How many examples of ``dataset`` are right; with several processes, all of them call this.

    Args:
        model: Its weights are on all devices (``load(..., sharding=NamedSharding(data_mesh(), PartitionSpec()))``).
        dataset: What to evaluate on.
        preprocessing: The evaluation transform and its normalisation.
        batch_size: Images at a time, over all devices and processes.
        workers: Processes that decode pictures, beside each process of the run; 0 uses threads.

    Returns:
        ``top1``, ``top5`` and ``count``, over all examples; those of a multi-label set that have no label
        are not counted.

    Raises:
        ValueError: Model and data set do not go together, the batch cannot be divided, or an unreadable picture.
    """
    require_matching(model, dataset)
    mesh = devices.data_mesh()
    if batch_size < 1 or batch_size % mesh.size:
        raise ValueError(f"a batch of {batch_size} cannot be divided evenly over {mesh.size} devices")
    replicated, sharded = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    graphdef, weights = nnx.split(nnx.clone(model).eval())

    @jax.jit(compiler_options=compiler_options())
    def step(weights, batch, sums):
        images = normalise(batch["image"], preprocessing.mean, preprocessing.std, model.param_dtype)
        # Whole float32 products: GPUs and TPUs would round the factors, and a few answers with them.
        with jax.default_matmul_precision("highest"):
            logits = nnx.merge(graphdef, weights)(images)
        counts = metrics.count(logits, batch["label"], batch["mask"], dataset.class_subset)
        return jax.lax.with_sharding_constraint(jax.tree.map(jnp.add, sums, counts), replicated)

    batches = eval_batches(
        dataset,
        preprocessing=preprocessing,
        batch_size=batch_size // jax.process_count(),
        workers=workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    zeros = dict.fromkeys(("top1", "top5", "count"), np.zeros((), np.int32))
    sums = devices.global_arrays(zeros, replicated)
    bar = tqdm(total=len(dataset), unit="img", disable=None if jax.process_index() == 0 else True)
    try:
        for batch in devices.in_step(batches):
            sums = step(weights, devices.global_arrays(batch, sharded), sums)
            bar.update(min(batch_size, bar.total - bar.n))
    finally:
        bar.close()
        batches.close()
    counts = {name: int(total) for name, total in sums.items()}
    if not dataset.multi_label and counts["count"] != len(dataset):
        raise RuntimeError(f"counted {counts['count']} of {len(dataset)} examples")
    if not counts["count"]:
        raise ValueError(f"no example of {dataset.name}[{dataset.split}] has a label")
    return counts


def require_matching(model: Res2Net, dataset: Dataset) -> None:
    """ValueError unless the model's classes and channels are those of the data set."""
    if model.num_classes != dataset.num_classes:
        raise ValueError(f"the model has {model.num_classes} classes and {dataset.name} has {dataset.num_classes}")
    if model.in_chans != dataset.in_chans:
        raise ValueError(f"the model takes {model.in_chans} channels and {dataset.name} has {dataset.in_chans}")
    ours, theirs = model.class_names, dataset.class_names
    if ours and theirs and tuple(ours) != tuple(theirs):
        at = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
        raise ValueError(
            f"the classes of the model and of {dataset.name} are not the same, or in another order: "
            f"class {at} is {ours[at]!r} in the model and {theirs[at]!r} in the data set"
        )


def published(model: Res2Net, dataset: Dataset) -> Accuracy | None:
    """The published accuracy to compare with: that of the model's variant on such pictures, if there is one."""
    variant = VARIANTS.get(model.name)
    if variant is None or model.arch != variant.arch or dataset.class_names is not None or "train" in dataset.split:
        return None
    if dataset.name.startswith("folder:"):
        attribute = _COMPLETE.get((len(dataset), dataset.class_subset))
    else:
        attribute = _PUBLISHED.get(dataset.name.partition(":")[0])
    return getattr(variant, attribute) if attribute and "[" not in dataset.split else None


def default_table(dataset: str, split: str, held_out: str) -> str:
    """The name of the CSV file for results on ``split``; the columns say neither, so no two share a file."""
    name = dataset if split == held_out else f"{dataset}-{split}"
    return f"results-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.csv"


def append_row(path: Path, row: dict[str, str]) -> None:
    """Adds ``row`` to the CSV file ``path``, with a header if it is new."""
    with writing(path), open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def require_table(path: Path) -> None:
    """ValueError if ``path`` is something else than a table of results; OSError if it cannot be written."""
    if path.is_dir():
        raise IsADirectoryError(f"--csv {path} is a folder; name a file, such as {path / 'results.csv'}")
    if not path.exists():
        if not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"--csv {path}: there is no folder {path.absolute().parent}")
        with writing(path):
            tempfile.TemporaryFile(dir=path.absolute().parent).close()
        return
    with writing(path), open(path, "r+", newline="", errors="replace") as file:
        header = file.readline(1000).strip()
    if header and header != ",".join(COLUMNS):
        raise ValueError(f"--csv {path} is another kind of table; its columns should be {','.join(COLUMNS)}")


def run(arguments: list[str]) -> None:
    """The command."""
    options = tyro.cli(Options, args=arguments, prog="python -m train.evaluate", description=__doc__)
    changes = {name: value for name in ("size", "crop_pct") if (value := getattr(options, name)) is not None}
    if changes.get("size", 1) < 1 or not 0 < changes.get("crop_pct", 1) <= 1:
        raise ValueError(f"--size must be at least 1 and --crop-pct above 0 and at most 1; got {changes}")
    if options.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1; got {options.batch_size}")
    devices.connect(options.coordinator, options.num_processes, options.process_id)
    dataset = devices.together(lambda: open_dataset(options.dataset, options.split, data_dir=options.data_dir))
    path = Path(options.csv or default_table(dataset.name, dataset.split, dataset.held_out)).expanduser()
    first = jax.process_index() == 0
    devices.together(lambda: require_table(path) if first else None)
    everywhere = NamedSharding(devices.data_mesh(), PartitionSpec())
    require_agreement(dataclasses.asdict(options), {"pictures to evaluate on": dataset})
    model = devices.together(lambda: load_model(options.model, sharding=everywhere))
    require_same_weights(model)
    setting = dataclasses.replace(preprocessing_of(model), **changes)
    counts = evaluate(model, dataset, setting, batch_size=options.batch_size, workers=options.workers)
    if first:
        result = Accuracy(*(100 * counts[name] / counts["count"] for name in ("top1", "top5")))
        print(summary(options.model, model, dataset, setting, counts["count"], result))
        append_row(path, table_row(options.model, model, setting, result))
        print(f"Added to {path}")


def summary(title: str, model: Res2Net, dataset: Dataset, setting: Preprocessing, count: int, result: Accuracy) -> str:
    """The result beside the published one, as a small table."""
    rows = [("", "top-1", "top-5"), ("measured", f"{result.top1:.3f}", f"{result.top5:.3f}")]
    if (theirs := published(model, dataset)) and setting == preprocessing_of(model):
        rows.append(("published", f"{theirs.top1:.3f}", f"{theirs.top5:.3f}"))
        rows.append(("difference", f"{result.top1 - theirs.top1:+.3f}", f"{result.top5 - theirs.top5:+.3f}"))
    return (
        f"{title} on {dataset.name}, split {dataset.split}: {count} images of {setting.size} x {setting.size} "
        f"(crop {setting.crop_pct:g}, {setting.interpolation})\n" + command_line.table(rows)
    )


def table_row(title: str, model: Res2Net, setting: Preprocessing, result: Accuracy) -> dict[str, str]:
    """A row of timm's result tables: accuracies in per cent, parameters in millions."""
    millions = count_parameters(model) / 1e6
    cells = (
        title,
        f"{result.top1:.3f}",
        f"{100 - result.top1:.3f}",
        f"{result.top5:.3f}",
        f"{100 - result.top5:.3f}",
        f"{millions:.2f}",
        str(setting.size),
        f"{setting.crop_pct:g}",
        setting.interpolation,
    )
    return dict(zip(COLUMNS, cells, strict=True))


if __name__ == "__main__":
    use_compilation_cache()
    command_line.main(run)
