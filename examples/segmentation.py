"""Semantic segmentation with a dilated Res2Net as the backbone: shapes drawn at random, learned in a minute or two.

    python examples/segmentation.py [--steps 800] [--output demo/segmentation.png]

For real work take a trained backbone, ``res2net_jax.load("res2net50d", features_only=True,
out_indices=(-1,), output_stride=8)``, and real pictures; the rest stays as it is.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from flax import nnx
from PIL import Image, ImageDraw
from tqdm import trange

import res2net_jax
from res2net_jax.backend import compiler_options

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CLASSES = ("background", "disc", "square", "triangle")
SIDE = 64


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a backbone and a two-layer head on random shapes."""

    steps: int = 800
    batch_size: int = 16
    lr: float = 3e-3
    seed: int = 0
    output: Path = Path("demo/segmentation.png")
    """Picture of what was learned."""


class Segmenter(nnx.Module):
    """Images [b, h, w, 3] -> class scores of every pixel [b, h, w, k]."""

    def __init__(self, backbone: res2net_jax.FeaturePyramid, num_classes: int, *, rngs: nnx.Rngs):
        features = backbone.feature_info[-1]["num_chs"]
        self.backbone = backbone
        self.hidden = nnx.Conv(features, 64, (3, 3), rngs=rngs)
        self.scores = nnx.Conv(64, num_classes, (1, 1), rngs=rngs)

    def __call__(self, images):
        (features,) = self.backbone(images)
        scores = self.scores(jax.nn.relu(self.hidden(features)))
        return jax.image.resize(scores, (*images.shape[:3], scores.shape[-1]), "bilinear")


def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image [s, s, 3] of a few coloured shapes on a noisy ground, and the class of each pixel [s, s]."""
    image = Image.new("RGB", (SIDE, SIDE), tuple(rng.integers(0, 256, 3)))
    labels = Image.new("L", (SIDE, SIDE), 0)
    for kind in rng.integers(1, len(CLASSES), rng.integers(1, 4)):
        colour, radius = tuple(rng.integers(0, 256, 3)), rng.integers(10, 18)
        x, y = rng.integers(radius, SIDE - radius, 2)
        for canvas, fill in ((ImageDraw.Draw(image), colour), (ImageDraw.Draw(labels), int(kind))):
            if kind == 1:
                canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
            elif kind == 2:
                canvas.rectangle((x - radius, y - radius, x + radius, y + radius), fill=fill)
            else:
                canvas.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=fill)
    pixels = np.asarray(image, np.float32) + rng.normal(0, 10, (SIDE, SIDE, 3))
    return ((pixels - 128) / 64).astype(np.float32), np.asarray(labels, np.int32)


def batch(seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    pairs = [draw(np.random.default_rng([seed, i])) for i in range(size)]
    return tuple(map(np.stack, zip(*pairs)))


def mean_iou(predicted: np.ndarray, labels: np.ndarray) -> tuple[float, list[float]]:
    """Intersection over union, the mean over the classes and each."""
    ious = []
    for k in range(len(CLASSES)):
        ours, theirs = predicted == k, labels == k
        ious.append(float((ours & theirs).sum() / max((ours | theirs).sum(), 1)))
    return float(np.mean(ious)), ious


def main(config: Config) -> float:
    backbone = res2net_jax.create(
        "res2net50d",
        layers=(1, 1, 2, 1),
        channels=(16, 24, 32, 48),
        features_only=True,
        out_indices=(-1,),
        output_stride=8,
        rngs=config.seed,
    )
    model = Segmenter(backbone, len(CLASSES), rngs=nnx.Rngs(config.seed))
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    optimizer = optax.adam(optax.cosine_decay_schedule(config.lr, config.steps))

    @jax.jit(donate_argnums=(0, 1, 2), compiler_options=compiler_options())
    def step(params, stats, moments, images, labels):
        def loss_fn(params):
            model = nnx.merge(graphdef, params, stats, copy=True)
            loss = optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()
            return loss, nnx.state(model, nnx.BatchStat)

        (loss, stats_), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, moments = optimizer.update(gradients, moments)
        return optax.apply_updates(params, updates), stats_, moments, loss

    moments = optimizer.init(params)
    for i in (progress := trange(config.steps, desc="training")):
        params, stats, moments, loss = step(params, stats, moments, *batch(config.seed + 1 + i, config.batch_size))
        progress.set_postfix(loss=f"{loss:.3f}", refresh=False)

    model = nnx.merge(graphdef, params, stats)
    model.backbone.eval()
    images, labels = batch(10**9, 64)  # pictures that were not trained on
    predicted = np.asarray(jax.jit(lambda m, x: m(x).argmax(-1))(model, jnp.asarray(images)))
    mean, ious = mean_iou(predicted, labels)
    print(f"mean IoU {mean:.3f}: " + ", ".join(f"{name} {iou:.3f}" for name, iou in zip(CLASSES, ious)))
    print(f"pictures: {show(images, labels, predicted, mean, config.output)}")
    return mean


def show(images, labels, predicted, mean, file: Path) -> Path:
    """Eight images, their truth and the prediction, one column each."""
    figure, axes = plt.subplots(3, 8, figsize=(13, 5.4))
    for column, triple in zip(range(8), zip(images, labels, predicted)):
        for row, (title, picture) in enumerate(zip(("image", "truth", "prediction"), triple)):
            axes[row, column].imshow(
                np.clip(picture / 4 + 0.5, 0, 1) if row == 0 else picture, vmin=0, vmax=3, cmap="magma"
            )
            axes[row, column].set(xticks=[], yticks=[])
            axes[row, 0].set_ylabel(title, fontsize=12)
    figure.suptitle(f"{', '.join(CLASSES)}; mean IoU on 64 new pictures {mean:.3f}")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    plt.close(figure)
    return file


if __name__ == "__main__":
    main(tyro.cli(Config))
