"""What a run is made of: one frozen dataclass, and the recipes, which are short named instances of it."""

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from train.data import Augment


@dataclasses.dataclass(frozen=True)
class Config:
    """Every switch of the trainer. The defaults are the official recipe."""

    model: str = "res2net50_26w_4s"
    """A name of res2net_jax.list_models(), or with --pretrained also a checkpoint folder."""
    pretrained: bool = False
    """Start from trained weights (res2net_jax.load); the classifier is fresh unless the classes are the same."""
    layers: tuple[int, ...] | None = None
    """Blocks in each stage, instead of the model's own."""
    channels: tuple[int, ...] | None = None
    """Planes of each stage, instead of the model's own."""
    base_width: int | None = None
    """Width of one split in a 64-plane block, instead of the model's own."""
    scale: int | None = None
    """Number of splits, instead of the model's own."""
    drop_rate: float | None = None
    """Dropout before the classifier, instead of the model's own rate (as a rule 0)."""
    drop_path_rate: float | None = None
    """Stochastic depth, rising linearly to this rate in the last block (Huang et al. 2016)."""
    drop_block_rate: float | None = None
    """DropBlock in the last two stages (Ghiasi et al. 2018)."""
    zero_init_last: bool = False
    """Zero the last norm's scale of each block, so that a block starts as its shortcut (timm's default)."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the computation. Parameters, statistics and the loss stay float32; with float64 all are float64."""
    remat: bool = False
    """Keep only each block's input for the backward pass and compute the rest again: less memory, more time."""
    batchnorm_group: int | None = None
    """Images that share batch statistics (the paper's 64). By default the whole global batch does."""

    dataset: str = "imagenet2012"
    """A TFDS classification set, "folder:DIR" (one sub-folder per class), or "digits" (needs no download)."""
    data_dir: str | None = None
    """Where TFDS keeps its data sets."""
    train_split: str = "train"
    """Split to learn from."""
    eval_split: str = "validation"
    """Split to evaluate on."""
    size: int = 224
    """Side of the training and evaluation images, in pixels."""
    eval_crop_pct: float | None = None
    """Share of the shorter side that evaluation crops, instead of the model's published setting."""
    batch_size: int = 256
    """Images in one optimiser step, over all devices and processes."""
    eval_batch_size: int | None = None
    """Images in one evaluation step over all devices; by default as many as are computed at once in training."""
    workers: int = 0
    """Processes that decode pictures, beside each process of the run; 0 uses threads. It changes nothing but speed."""
    augment: Annotated[Augment, tyro.conf.arg(name="")] = Augment()
    mixup: float = 0.0
    """Mixup's alpha (Zhang et al. 2018); 0 is off."""
    cutmix: float = 0.0
    """CutMix's alpha (Yun et al. 2019); 0 is off. With mixup on as well, each step draws one of the two."""
    random_erasing: float = 0.0
    """Probability of erasing a rectangle of an image (Zhong et al. 2020)."""

    epochs: int = 100
    """Passes over the training split."""
    lr: float = 0.1
    """Learning rate for a batch of 256; it is scaled by batch_size / 256 (Goyal et al. 2017)."""
    schedule: Literal["steps", "cosine"] = "steps"
    """Tenfold smaller every decay_epochs, or half a cosine down to 0 at the last step."""
    decay_epochs: int = 30
    """Epochs between two drops of the "steps" schedule."""
    warmup_epochs: float = 0.0
    """Epochs in which the learning rate rises linearly from 0."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Nesterov's momentum instead of the classical one."""
    weight_decay: float = 1e-4
    """Added to the gradient as weight_decay * parameter, before momentum, as torch.optim.SGD does."""
    decay_all: bool = True
    """Also decay the norms' scales and all biases."""
    layer_decay: float | None = None
    """Factor on the learning rate for each block further from the classifier (e.g. 0.8, for fine-tuning)."""
    freeze: Literal["backbone"] | None = None
    """Train the classifier alone: the backbone keeps its weights, and its norms use and keep their statistics."""
    label_smoothing: float = 0.1
    """Probability spread evenly over all classes."""
    clip_norm: float | None = None
    """Largest global norm of the gradient."""
    accumulate: int = 1
    """Parts a batch is cut into, to be computed one after the other: less memory. Each has its own batch statistics."""
    ema: float | None = None
    """Decay of a running average of the weights, e.g. 0.9999 (at step n at most (1 + n) / (10 + n), so that it follows
    faster at first). It is then what is evaluated, and what load() reads."""

    output: str = "runs/latest"
    """Folder of the checkpoints, metrics and curves. A run found there is resumed."""
    seed: int = 0
    """Seed of the initial weights, of the order of the examples and of all augmentation."""
    steps: int | None = None
    """Stop after this many steps rather than at the last epoch; the schedule stays that of all epochs."""
    eval_every: int = 1
    """Epochs between two evaluations."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; one more is written after each evaluation."""
    keep: int = 2
    """Newest checkpoints to keep, beside the best."""
    log_every: int = 50
    """Steps between two lines of metrics.csv."""

    coordinator: str | None = None
    """HOST:PORT of process 0, where the cluster does not say (TPU pods, Slurm and Open MPI do)."""
    num_processes: int | None = None
    """Number of processes, with --coordinator."""
    process_id: int | None = None
    """Number of this process, with --coordinator."""
    dry_run: bool = False
    """Print parameters, memory, steps, learning rates and a batch's shapes; train nothing."""
    fake_data: bool = False
    """Time the step on random images; read and write nothing."""

    def __post_init__(self):
        _validate(self)

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up, for this batch."""
        return self.lr * self.batch_size / 256

    @property
    def eval_images(self) -> int:
        """Images in one evaluation step, over all devices and processes."""
        return self.eval_batch_size or self.batch_size // self.accumulate

    @property
    def arch(self) -> dict:
        """The architecture fields that are overridden."""
        names = ("layers", "channels", "base_width", "scale", "drop_rate", "drop_path_rate", "drop_block_rate")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


#: Steps that a run can count: their number is an int32 on the devices.
MOST = 2**31 - 1


def paper() -> Config:
    """The official recipe: SGD, lr / 10 every 30 of 100 epochs, batch 256, BatchNorm over 64 images as on its 4 GPUs.

    The published accuracy of every res2net50_* and of res2net101_26w_4s comes from it
    (res2net50_26w_4s: 77.99 % top-1; python -m res2net_jax info NAME prints the others).
    """
    return Config(batchnorm_group=64)


def cosine() -> Config:
    """The official recipe with half a cosine and five epochs of warm-up; fit for large batches. No published figure."""
    return Config(schedule="cosine", warmup_epochs=5, zero_init_last=True, decay_all=False)


def v1b() -> Config:
    """Cosine, 300 epochs, mixup, for res2net50d and res2net101d.

    The recipe of the v1b releases was never published; their author calls mixup, cosine and 300
    epochs similar. So this is an approximation, and no accuracy is promised.
    """
    return Config(model="res2net50d", schedule="cosine", epochs=300, warmup_epochs=5, mixup=0.2, decay_all=False)


def finetune() -> Config:
    """From trained weights to another data set: new classifier, small learning rate, lower layers held back."""
    return Config(
        dataset="folder:pictures",
        pretrained=True,
        epochs=20,
        schedule="cosine",
        lr=0.02,
        warmup_epochs=1,
        layer_decay=0.85,
        decay_all=False,
    )


def digits() -> Config:
    """scikit-learn's 1,797 handwritten digits on a small Res2Net: 99 % of the test split in a minute on a laptop."""
    return Config(
        dataset="digits",
        layers=(1, 1),
        channels=(24, 48),
        size=32,
        augment=Augment(crop_scale=(0.6, 1.0), flip=0.0),
        eval_crop_pct=1.0,
        batch_size=64,
        lr=0.4,
        epochs=30,
        ema=0.99,
        schedule="cosine",
        warmup_epochs=1,
        output="runs/digits",
        checkpoint_every=100,
        log_every=10,
    )


RECIPES = {recipe.__name__: recipe for recipe in (paper, cosine, v1b, finetune, digits)}


def parse(arguments: Sequence[str], prog: str) -> Config:
    """The config of a command line ``[RECIPE] [--switch value ...]``; without a recipe it is ``paper``.

    Raises:
        ValueError: There is no such recipe, or values that contradict each other.
        SystemExit: ``--help``, or an unknown switch (status 2).
    """
    arguments = list(arguments)
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "paper"
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, 1)
        hint = f'did you mean "{close[0]}"?' if close else f"there are {', '.join(RECIPES)}"
        raise ValueError(f'there is no recipe "{name}"; {hint}')
    summaries = "\n".join(f"  {key:9} {recipe.__doc__.splitlines()[0]}" for key, recipe in RECIPES.items())
    data = " --dataset folder:flowers" if name == "finetune" else ""
    description = f"{prog} {name}{data} --output runs/{name}\n\nTrains a Res2Net. Recipes:\n\n{summaries}\n\n"
    return tyro.cli(
        Config,
        prog=f"{prog} [{'|'.join(RECIPES)}]",
        description=f"{description}Switches, with the values of {name}:",
        default=RECIPES[name](),
        args=arguments,
        config=(tyro.conf.AvoidSubcommands,),
    )


def to_json(config: Config) -> dict:
    """``config`` as plain JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def write_json(config: Config, file: Path) -> None:
    """Writes ``config`` to ``file``, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(to_json(config), indent=2) + "\n")
    os.replace(temporary, file)


def _validate(config):
    limits = {
        "greater than 0": (
            lambda value: value > 0,
            ("size", "batch_size", "eval_batch_size", "batchnorm_group", "accumulate", "epochs", "steps", "lr")
            + ("decay_epochs", "clip_norm", "eval_every", "checkpoint_every", "keep", "log_every"),
        ),
        "at least 0": (
            lambda value: value >= 0,
            ("workers", "mixup", "cutmix", "warmup_epochs", "weight_decay"),
        ),
        f"at most {MOST}": (lambda value: value <= MOST, ("epochs", "decay_epochs")),
        f"from 0 to {2**32 - 1}": (lambda value: 0 <= value < 2**32, ("seed",)),
        "from 0 to 1": (lambda value: 0 <= value <= 1, ("momentum", "label_smoothing", "random_erasing")),
        "above 0 and at most 1": (lambda value: 0 < value <= 1, ("layer_decay", "ema", "eval_crop_pct")),
    }
    for expected, (holds, names) in limits.items():
        for name in names:
            value = getattr(config, name)
            if value is not None and not (holds(value) and math.isfinite(value)):
                raise ValueError(f"--{name.replace('_', '-')} must be {expected}; got {value!r}")
    if config.freeze and not config.pretrained:
        raise ValueError("--freeze keeps the backbone as it is, which makes sense for a trained one; add --pretrained")
    if config.warmup_epochs >= config.epochs:
        raise ValueError(
            f"--warmup-epochs {config.warmup_epochs} leaves none of the {config.epochs} epochs; train for more epochs, "
            "or with --warmup-epochs 0"
        )
    if config.batch_size % config.accumulate:
        raise ValueError(
            f"--batch-size {config.batch_size} cannot be cut into {config.accumulate} equal parts (--accumulate)"
        )
    part = config.batch_size // config.accumulate
    if config.batchnorm_group and part % config.batchnorm_group:
        raise ValueError(
            f"--batchnorm-group {config.batchnorm_group} does not divide the {part} images that are computed at once "
            f"(--batch-size {config.batch_size} / --accumulate {config.accumulate})"
        )
