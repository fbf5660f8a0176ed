"""From a PyTorch release file to the classes of two photographs, offline.

    python examples/port_and_classify.py [--output demo]

The published weights cannot be had without a network, so timm writes a file in the release's layout
first: everything is as with the release, but the weights are random and the answers mean nothing.
With a network, ``res2net_jax.load("res2net50_14w_8s")`` is all it takes.
"""

import dataclasses
from pathlib import Path

import matplotlib
import tyro

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import sklearn.datasets
import timm
import torch
from PIL import Image

import porting
import res2net_jax
from porting.parity import worst
from res2net_jax.metadata import read_metadata


@dataclasses.dataclass(frozen=True)
class Config:
    """Ports a release file, certifies it, and classifies two photographs."""

    model: str = "res2net50_14w_8s"
    output: Path = Path("demo")
    """Folder for the release file, the checkpoint and the picture."""


def main(config: Config) -> None:
    config.output.mkdir(parents=True, exist_ok=True)
    variant = res2net_jax.get_variant(config.model)

    release = config.output / variant.pth
    torch.save(random_release(config.model), release, _use_new_zipfile_serialization=False)  # the format of 2019
    print(f"1. {release}: RANDOM weights in the layout of the release (there is no network to get the real ones)")

    # check_hash=False, because random weights cannot have the hash in the release's name.
    folder = porting.port(config.model, release, config.output / config.model, check_hash=False, overwrite=True)
    certificate = read_metadata(folder)["certificate"]
    print(f"2. {folder}: ported, and certified against {certificate['reference']}:")
    print(f"   largest relative difference {worst(certificate, 'float64'):.0e} in float64, ", end="")
    print(f"{worst(certificate, 'float32'):.0e} in float32")

    model = res2net_jax.load(folder)
    photos = [Path(sklearn.datasets.__file__).parent / "images" / name for name in ("china.jpg", "flower.jpg")]
    answers = res2net_jax.classify(model, photos)
    picture = draw(photos, answers, config.output / "predictions.png", f"{config.model}, random weights")
    print(f"3. {picture}: two photographs and their five likeliest classes (random weights: they mean nothing)")


def random_release(name: str) -> dict[str, torch.Tensor]:
    """timm's model with random weights, its norms fitted to noise as training would fit them to images."""
    torch.manual_seed(0)
    model = timm.create_model(name).train()
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain mean over all batches
            if path.endswith("bn3"):
                torch.nn.init.constant_(module.weight, 0.2)  # a fresh one is zero and would hide its block
    with torch.no_grad():
        model(torch.randn(8, 3, 224, 224))
    return model.state_dict()


def draw(photos: list[Path], answers: list[list[res2net_jax.Prediction]], file: Path, title: str) -> Path:
    """A row per photograph: the picture, and a bar per class."""
    figure, rows = plt.subplots(len(photos), 2, figsize=(10, 3.2 * len(photos)), width_ratios=(1, 1.2), squeeze=False)
    for (left, right), photo, predictions in zip(rows, photos, answers):
        left.imshow(Image.open(photo))
        left.set_title(photo.name, fontsize=10)
        left.axis("off")
        labels = [prediction.label.split(",")[0] for prediction in predictions]
        bars = right.barh(labels, [prediction.probability for prediction in predictions], color="#3b6ea8")
        right.bar_label(bars, [f"{prediction.probability:.2%}" for prediction in predictions], padding=3, fontsize=9)
        right.invert_yaxis()
        right.margins(x=0.2)
        right.set_xlabel("probability")
        right.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return file


if __name__ == "__main__":
    main(tyro.cli(Config))
