"""make demo: trains a small Res2Net on scikit-learn's digits, loads what it saved, and draws what it learned.

    python -m train.demo

A minute or so on two cores, without a download, without torch. The folder ``demo`` then holds ``curves.png``,
``predictions.png`` and the run itself.
"""

if __name__ == "__main__":  # which starts anew, so before the imports
    from train.extra import require_extra
    from train.huge_pages import use_huge_pages

    require_extra("train.demo")
    use_huge_pages("train.demo")

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import res2net_jax
from res2net_jax import command_line
from train.augment import normalise
from train.config import RECIPES
from train.data import eval_batches
from train.datasets import open_dataset
from train.imagenet import main
from train.report import draw_curves, read_rows
from train.same_run import differences
from train.signals import StopRequest

FOLDER = Path("demo")
ROWS, COLUMNS = 6, 12


def demo() -> int:
    """python -m train.demo

    Trains a small Res2Net on scikit-learn's digits, loads what it saved, and draws what it learned, in the folder demo.
    One that was interrupted continues; one that is done is made anew.
    """
    run = FOLDER / "run"
    config = dataclasses.replace(RECIPES["digits"](), output=str(run))
    if _is_over(run, config):
        shutil.rmtree(run)
    with StopRequest() as stop:
        code = main(config, stop)
    if code:
        return code

    model = res2net_jax.load(run / "checkpoints")
    images, labels = test_images(config, model)
    probabilities = np.asarray(jax.nn.softmax(jax.jit(predict)(model, images)))
    predictions = probabilities.argmax(-1)
    correct = predictions == labels
    print(f"res2net_jax.load: {correct.sum()} of {len(labels)} test digits right, {100 * correct.mean():.2f} %")

    draw_curves(read_rows(run / "metrics.csv"), FOLDER / "curves.png")
    draw_predictions(images, labels, probabilities, FOLDER / "predictions.png")
    print(f"Look at {FOLDER / 'curves.png'} and {FOLDER / 'predictions.png'}.")
    return 0


def _is_over(run, config):
    """Whether there is a run that is done, or was of another version."""
    if not (run / "config.json").exists():
        return False
    return (run / "confusion.png").exists() or bool(differences(json.loads((run / "config.json").read_text()), config))


def test_images(config, model) -> tuple[np.ndarray, np.ndarray]:
    """All test digits as the trainer's evaluation sees them (uint8 [n, h, w, 1]), and their labels."""
    held_out = open_dataset(config.dataset, "test")
    batches = list(eval_batches(held_out, preprocessing=model.preprocessing, batch_size=config.batch_size))
    images, labels, mask = (np.concatenate([batch[name] for batch in batches]) for name in ("image", "label", "mask"))
    return images[mask], labels[mask]


def predict(model, images):
    """Logits of uint8 images."""
    return model(normalise(images, model.preprocessing.mean, model.preprocessing.std))


def draw_predictions(images: np.ndarray, labels: np.ndarray, probabilities: np.ndarray, file: Path) -> None:
    """Digits with the predicted class and its probability: every mistake, framed, and a sample of the rest."""
    predictions = probabilities.argmax(-1)
    wrong = np.flatnonzero(predictions != labels)
    right = np.random.default_rng(0).permutation(np.flatnonzero(predictions == labels))
    shown = np.concatenate([wrong, right])[: ROWS * COLUMNS]

    figure = Figure(figsize=(COLUMNS * 1.0, ROWS * 1.22 + 0.6), layout="constrained")
    figure.suptitle(
        f"{len(labels)} test digits, {len(wrong)} mistakes ({100 * (1 - len(wrong) / len(labels)):.2f} % right); "
        "the mistakes come first",
        fontsize=12,
    )
    for axes, index in zip(figure.subplots(ROWS, COLUMNS).ravel(), shown):
        prediction, label = predictions[index], labels[index]
        mistake = prediction != label
        axes.imshow(images[index, :, :, 0], cmap="gray_r", vmin=0, vmax=255)
        axes.set_axis_off()
        caption = f"{prediction}  {100 * probabilities[index, prediction]:.0f} %"
        if mistake:
            caption += f"\nis {label}"
            frame = Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor="tab:red", linewidth=3)
            axes.add_patch(frame)
        axes.set_title(caption, fontsize=9, color="tab:red" if mistake else "black", pad=3)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    command_line.main(lambda arguments: tyro.cli(demo, prog="python -m train.demo", args=arguments))
