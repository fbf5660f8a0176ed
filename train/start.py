"""What a run starts from: its two data sets, its model and its evaluation transform, each fit for the others."""

import collections
import dataclasses
import os
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import res2net_jax
from res2net_jax import hub
from res2net_jax.init import variables
from res2net_jax.metadata import locate
from res2net_jax.model import Res2Net
from res2net_jax.variants import VARIANTS, Preprocessing
from train import devices
from train.config import MOST, Config
from train.datasets import Dataset, open_dataset
from train.run_folder import saved_in
from train.same_run import FOLDER
from train.sources import Files

# Of the options, what each process may have in a place of its own.
_OWN = {"data_dir", "workers", "output", "csv", "coordinator", "process_id"}


def open_splits(config: Config) -> tuple[Dataset, Dataset]:
    """What to train and what to evaluate on.

    Raises:
        ValueError: They do not fit each other, or are the same pictures.
        FileNotFoundError: There is no such data.
    """
    train_set = open_dataset(config.dataset, config.train_split, data_dir=config.data_dir)
    eval_set = open_dataset(config.dataset, config.eval_split, data_dir=config.data_dir)
    if eval_set.multi_label:
        raise ValueError(f"{eval_set.name} has several labels an example; python -m train.evaluate handles it")
    if train_set.num_classes != eval_set.num_classes or train_set.in_chans != eval_set.in_chans:
        raise ValueError(f"{train_set.name}: {train_set.split} and {eval_set.split} differ in classes or channels")
    if train_set.split == eval_set.split or _overlap(train_set.pieces, eval_set.pieces):
        name = train_set.split.partition("[")[0]
        parts = ("train", "test") if train_set.name == "digits" else (f'"{name}[:80%]"', f'"{name}[80%:]"')
        splits = " and ".join(dict.fromkeys((train_set.split, eval_set.split)))
        raise ValueError(
            f"{train_set.name} would be trained and evaluated on the same pictures ({splits}); name two parts: "
            f"--train-split {parts[0]} --eval-split {parts[1]}, or divide a folder into the sub-folders train and val"
        )
    return train_set, eval_set


def _overlap(some, others):
    ranges = collections.defaultdict(list)
    for file, first, end in some:
        ranges[file].append((first, end))
    return any(max(first, i) < min(end, j) for file, i, j in others for first, end in ranges[file])


def load_model(name: str, **options) -> Res2Net:
    """:func:`res2net_jax.load`, which all processes call together, for the commands.

    All load the same checkpoint of a run. Where ``source=`` is asked for, which no command here has, it says what
    works here.
    """
    try:
        return res2net_jax.load(_same_checkpoint(name), **options)
    except (OSError, ValueError) as error:
        if "source=" not in str(error):
            raise
        name = name if name in VARIANTS else "NAME"
        raise type(error)(
            f"{error}. For this command port it first: python -m porting {name} --source FILE --output DIR, then "
            "--model DIR"
        ) from error


def _same_checkpoint(name):
    """Where the weights called ``name`` are on this host, once all have them: Orbax waits five minutes for the others.

    Of a run the checkpoint that is the newest to process 0, for to the others it may be another one.
    """
    if jax.process_count() == 1:
        return name
    found = devices.together(lambda: _here(name))
    step = devices.of_the_first([int(found.name)] if found.name.isdigit() else [])
    return found.with_name(str(*step)) if step else found


def _here(name):
    if not hub.is_folder(name):
        return hub.cached(name)
    hub.require_no_address(name)
    return locate(hub.local_folder(name))


def build_model(config: Config, dataset: Dataset) -> Res2Net:
    """The model to train, fresh or (``config.pretrained``) trained; its classifier is kept for the same classes."""
    options = {
        "in_chans": dataset.in_chans,
        "dtype": jnp.dtype(config.dtype),
        "param_dtype": jnp.promote_types(config.dtype, jnp.float32),
        **config.arch,
    }
    if config.pretrained:
        model = _load_weights(config, options)
        if (model.num_classes, model.class_names) != (dataset.num_classes, dataset.class_names):
            model.reset_classifier(dataset.num_classes, rngs=config.seed, class_names=dataset.class_names)
        return model
    if hub.is_folder(config.model):
        raise ValueError(f"--model {config.model} holds trained weights; add --pretrained to start from them")
    options |= {"num_classes": dataset.num_classes, "zero_init_last": config.zero_init_last}
    model = res2net_jax.create(config.model, rngs=config.seed, **options)
    model.class_names = dataset.class_names
    return model


def _load_weights(config, options):
    """The weights to start from; if they are gone, those of the run that began with them: it has what they decided."""
    folder = Path(config.output).expanduser() / "checkpoints"
    run = saved_in(folder)
    steps = devices.of_the_first([*run])
    if not steps or not _are_gone(config):
        return load_model(config.model, **options)
    for step in steps:
        try:
            return load_model(str(run.get(step, folder / str(step))), **options)
        except ValueError as error:  # damaged; which one the run continues from is decided later
            failure = error
    raise failure


def _are_gone(config):
    """Whether some process no longer has the folder of the weights to start from."""
    try:
        found = not hub.is_folder(config.model) or "://" in config.model or locate(config.model)
    except (OSError, ValueError):
        found = None
    return not devices.everywhere(bool(found))


def preprocessing(config: Config, model: Res2Net) -> Preprocessing:
    """How evaluation images are made: as for the weights the run began with, or as published, at ``config.size``."""
    setting = preprocessing_of(model)
    return dataclasses.replace(setting, size=config.size, crop_pct=config.eval_crop_pct or setting.crop_pct)


def preprocessing_of(model: Res2Net) -> Preprocessing:
    """The evaluation transform that the model's weights are for, else that of its variant, else the usual one."""
    variant = VARIANTS.get(model.name)
    setting = model.preprocessing or (variant.preprocessing if variant else Preprocessing())
    if model.in_chans == len(setting.mean):
        return setting
    # Grey images, say: the average of the RGB constants.
    means = {name: float(np.mean(getattr(setting, name))) for name in ("mean", "std")}
    return dataclasses.replace(setting, **{name: (mean,) * model.in_chans for name, mean in means.items()})


def require_divisible(config: Config) -> None:
    """ValueError unless the batches can be spread evenly over all devices."""
    count = jax.device_count()
    for name, size in (("--batch-size", config.batch_size), ("--eval-batch-size", config.eval_batch_size)):
        if size is not None and size % count:
            raise ValueError(
                f"{name} {size} cannot be spread evenly over {count} devices; "
                f"the nearest that can are {max(1, size // count) * count} and {(size // count + 1) * count}"
            )
    part = config.batch_size // config.accumulate
    if part % count:
        raise ValueError(
            f"--accumulate {config.accumulate} leaves {part} images at once, not a multiple of the {count} devices"
        )


def require_countable(config: Config, steps_per_epoch: int) -> None:
    """ValueError if the epochs have more steps than the state, whose number of the step is an int32, can count."""
    if config.epochs * steps_per_epoch > MOST:
        raise ValueError(
            f"--epochs {config.epochs} of {steps_per_epoch:,} steps each are more than the {MOST:,} steps that a run "
            f"counts; train for at most {MOST // steps_per_epoch:,}"
        )


def require_agreement(options: dict[str, object], datasets: dict[str, Dataset]) -> None:
    """ValueError unless all processes have the same options and data, wherever each keeps them.

    To be asked before any loads a model: for another one, Orbax would wait for ever.

    Args:
        options: Those of the command, by name.
        datasets: What each is called in a message, and the set.
    """
    if jax.process_count() > 1:
        facts = {name: value for name, value in options.items() if name not in _OWN}
        if options["dataset"].startswith("folder:"):
            facts["dataset"] = "folder"
        for name, dataset in datasets.items():
            facts[name] = len(dataset), *_contents(dataset)
            facts[f"classes of the {name}"] = dataset.num_classes, dataset.class_names
        devices.require_agreement(facts)


def require_same_weights(model: Res2Net) -> None:
    """ValueError unless all processes have the same weights, and each has all of them."""
    if jax.process_count() > 1:
        devices.require_agreement({"weights": _checksum(model)})


def checksums(config: Config, model: Res2Net, train_set: Dataset, eval_set: Dataset) -> dict[str, int]:
    """Of what a run began with and its config only names; without the weights if they are gone."""
    found = {"checksum of the pictures to learn from": zlib.crc32(repr(_contents(train_set)).encode())}
    if isinstance(train_set.source, Files):
        contents = _contents(eval_set), _sizes(train_set.source), _sizes(eval_set.source)
        found[FOLDER] = zlib.crc32(repr(contents).encode())
    if config.pretrained and not _are_gone(config):
        # Without the stem: for grey pictures the device sums it up, and devices round differently.
        found["checksum of the weights to start from"] = _checksum(model, without="conv1.")
    return found


def _checksum(model, without=None):
    total = 0
    for path, leaf in variables(model).items():
        if without is None or not path.startswith(without):
            total = zlib.crc32(np.asarray(leaf.get_value()).tobytes(), total)
    return total


def _contents(dataset):
    """What its pictures are, in their order, wherever they are kept."""
    if isinstance(dataset.source, Files):
        return (zlib.crc32(dataset.source.paths.tobytes() + dataset.source.labels.tobytes()),)
    return tuple((Path(file).name, first, end) for file, first, end in dataset.pieces)


def _sizes(files, most=1000):
    """Of so many of the files, evenly spread: of a million across a network it would take minutes."""
    chosen = np.unique(np.linspace(0, len(files) - 1, most).astype(int))
    return [os.stat(name).st_size if os.path.exists(name := files.name(i)) else None for i in chosen]


def introduction(
    config: Config, model: Res2Net, train_set: Dataset, eval_set: Dataset, steps_per_epoch: int, done: int, total: int
) -> str:
    """The config and what is made of it, for the beginning of a run's output."""
    lines = [f"  {name:17} {value}" for name, value in dataclasses.asdict(config).items()]
    lines.append(f"{model.name} on {train_set.name}: {len(train_set):,} pictures, {steps_per_epoch:,} steps an epoch")
    if train_set.class_names is None and isinstance(train_set.source, Files):
        found = len(np.unique(train_set.source.labels))
        if found < model.num_classes:
            lines.append(f"{found} of ImageNet's 1000 classes; the model has {model.num_classes} outputs")
    lines.append(f"evaluated on {eval_set.name}[{eval_set.split}]: {len(eval_set):,} pictures")
    lines.append(f"{jax.device_count()} x {jax.devices()[0].device_kind} in {jax.process_count()} process(es)")
    lines.append(f"{'Resuming' if done else 'Starting'} at step {done} of {total}; the first step compiles.")
    return "\n".join(lines)
