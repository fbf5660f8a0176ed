"""Fine-tuning from a folder of pictures beside the same run in torch: what accuracy do both reach?

    python -m benchmarks.finetune_vs_torch [--seeds 0 1 2]

scikit-learn's digits become folders of PNG files. A small Res2Net learns the digits 0 to 4; its checkpoint is
then fine-tuned on the digits 5 to 9 by ``python -m train.imagenet finetune``, and, exported to a file for timm, by
a plain torch loop with timm's layer decay and torchvision's pictures. These two start from other classifiers and
draw other orders and crops, so they differ by chance, which the seeds show. The same loop fed with the trainer's own
batches, and with its first classifier, must end with the same accuracy but for rounding.
"""

import contextlib
import dataclasses
import itertools
import math
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm
import torch
import tyro
from PIL import Image
from sklearn.datasets import load_digits
from timm.models.res2net import Bottle2neck
from timm.models.resnet import ResNet
from timm.optim import param_groups_layer_decay
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

import res2net_jax
from porting.convert import state_dict, to_numpy
from res2net_jax.command_line import main, table
from res2net_jax.variants import Preprocessing
from train import imagenet
from train.config import Config, parse
from train.data import train_batches
from train.datasets import open_dataset
from train.report import read_rows
from train.start import build_model, preprocessing

LAYERS, CHANNELS = (1, 1, 1, 1), (16, 32, 48, 64)
COMMON = ("--size", "32", "--batch-size", "64", "--crop-scale", "0.5", "1", "--flip", "0")
PRETRAIN = ("cosine", *COMMON, "--epochs", "20", "--warmup-epochs", "1", "--lr", "0.4")
PRETRAIN += ("--layers", *map(str, LAYERS), "--channels", *map(str, CHANNELS))
FINETUNE = ("finetune", *COMMON, "--epochs", "20", "--lr", "0.1")


@dataclasses.dataclass(frozen=True)
class Options:
    """Fine-tunes by both programs and prints their accuracies on held-out pictures."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Each is one run of both."""
    folder: Path | None = None
    """Where the pictures and runs go, by default a temporary folder."""


def write_digits(folder: Path, classes: range) -> Path:
    """``folder/{train,val}/DIGIT/NUMBER.png``; every fifth picture of a class is for ``val``."""
    data = load_digits()
    for digit in classes:
        for number, index in enumerate(np.flatnonzero(data.target == digit)):
            file = folder / ("val" if number % 5 == 4 else "train") / str(digit) / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.round(data.images[index] * (255 / 16)).astype(np.uint8)).save(file)
    return folder


def pretrain(folder: Path) -> Path:
    """The checkpoints of a run on the digits 0 to 4."""
    pictures = write_digits(folder / "zero-to-four", range(5))
    imagenet.command([*PRETRAIN, "--dataset", f"folder:{pictures}", "--output", str(folder / "pretrained")])
    return folder / "pretrained" / "checkpoints"


def finetune(pictures: Path, checkpoints: Path, output: Path, seed: int) -> float:
    """Top-1 accuracy (%) after the trainer's fine-tuning."""
    imagenet.command(command(pictures, checkpoints, output, seed))
    return float([row for row in read_rows(output / "metrics.csv") if row["val_top1"]][-1]["val_top1"])


def command(pictures: Path, checkpoints: Path, output: Path, seed: int) -> list[str]:
    """What follows ``python -m train.imagenet``."""
    return [
        *(*FINETUNE, "--model", str(checkpoints), "--dataset", f"folder:{pictures}"),
        *("--output", str(output), "--seed", str(seed)),
    ]


def torch_finetune(model: ResNet, batches: Iterator, steps: int, held_out: DataLoader, config: Config) -> float:
    """Top-1 accuracy (%) after the same in torch, with ``config``'s values and ``steps`` batches an epoch."""
    groups = param_groups_layer_decay(model, weight_decay=config.weight_decay, layer_decay=config.layer_decay)
    for group in groups:
        group["lr"] = config.peak_lr * group["lr_scale"]
    optimizer = torch.optim.SGD(groups, lr=config.peak_lr, momentum=config.momentum)
    warmup, total = round(config.warmup_epochs * steps), config.epochs * steps

    def factor(step):
        return (
            (step + 1) / warmup if step < warmup else (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
        )

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    model.train()
    for images, labels in itertools.islice(batches, total):
        optimizer.zero_grad()
        criterion(model(images), labels).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.inference_mode():
        right = sum(int((model(images).argmax(-1) == labels).sum()) for images, labels in held_out)
    return 100 * right / len(held_out.dataset)


def timm_model(weights: dict[str, torch.Tensor]) -> ResNet:
    """timm's model with these weights, and as many classes as they have."""
    classes = len(weights["fc.bias"])
    model = ResNet(Bottle2neck, LAYERS, channels=CHANNELS, base_width=26, block_args={"scale": 4}, num_classes=classes)
    model.load_state_dict(weights, strict=True)
    return model


def loaders(pictures: Path, config: Config, setting: Preprocessing) -> tuple[DataLoader, DataLoader]:
    """torchvision's batches of the training and of the held-out pictures, with the run's settings."""
    finish = [transforms.ToTensor(), transforms.Normalize(setting.mean, setting.std)]
    crop = transforms.RandomResizedCrop(config.size, config.augment.crop_scale, config.augment.crop_ratio)
    augment = [crop, transforms.RandomHorizontalFlip(config.augment.flip)]
    resize = [transforms.Resize(math.floor(config.size / setting.crop_pct)), transforms.CenterCrop(config.size)]
    train = ImageFolder(pictures / "train", transforms.Compose(augment + finish))
    held_out = ImageFolder(pictures / "val", transforms.Compose(resize + finish))
    return (
        DataLoader(train, config.batch_size, shuffle=True, drop_last=True),
        DataLoader(held_out, config.batch_size),
    )


def our_batches(config: Config, setting: Preprocessing) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The very batches that the trainer learns from, for torch."""
    dataset = open_dataset(config.dataset, config.train_split)
    normalise = transforms.Normalize(setting.mean, setting.std)
    options = {"size": config.size, "batch_size": config.batch_size, "seed": config.seed, "augment": config.augment}
    with contextlib.closing(train_batches(dataset, **options)) as batches:
        for batch in batches:
            images = torch.from_numpy(batch["image"].transpose(0, 3, 1, 2).copy()).float() / 255
            yield normalise(images), torch.from_numpy(batch["label"]).long()


def compare(folder: Path, seeds: tuple[int, ...]) -> None:
    """Runs everything in ``folder`` and prints the accuracies."""
    checkpoints = pretrain(folder)
    file = res2net_jax.export(res2net_jax.load(checkpoints), folder / "pretrained.pth", overwrite=True)
    weights = torch.load(file, weights_only=True)
    pictures = write_digits(folder / "five-to-nine", range(5, 10))
    rows = []
    for seed in seeds:
        output = folder / f"finetuned{seed}"
        arguments = command(pictures, checkpoints, output, seed)
        config = parse(arguments, "train")
        start = build_model(config, open_dataset(config.dataset, config.train_split))
        setting = preprocessing(config, start)
        torch.manual_seed(seed)
        train, held_out = loaders(pictures, config, setting)
        # timm leaves a new classifier as torch.nn.Linear makes it: uniform in +-1/sqrt(inputs), as ours.
        alone = timm_model(weights)
        alone.reset_classifier(5)
        endless = itertools.chain.from_iterable(itertools.repeat(train))
        same_start = {key: torch.from_numpy(np.array(to_numpy(value))) for key, value in state_dict(start).items()}
        fed = timm_model(same_start)
        rows.append(
            (
                finetune(pictures, checkpoints, output, seed),
                torch_finetune(alone, endless, len(train), held_out, config),
                torch_finetune(fed, our_batches(config, setting), len(train), held_out, config),
            )
        )
    print(f"\npython -m train.imagenet {' '.join(arguments)}\n")
    rows.append(tuple(map(statistics.mean, zip(*rows))))
    titles = [*(f"seed {seed}" for seed in seeds), "mean"]
    head = ("top-1 (%)", "res2net_jax", "torch", "torch, fed with our batches")
    print(table([head, *((title, *(f"{value:.2f}" for value in row)) for title, row in zip(titles, rows))]))
    count = len(held_out.dataset)
    print(f"{count} held-out pictures of 5 classes; torch {torch.__version__}, timm {timm.__version__}")


def run(arguments: list[str]) -> None:
    """The command."""
    torch.set_num_threads(1)  # the model is so small that several would only wait for each other
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.finetune_vs_torch")
    with tempfile.TemporaryDirectory() as temporary:
        compare(options.folder or Path(temporary), options.seeds)


if __name__ == "__main__":
    main(run)
