"""Training pictures per second of one worker process, ours beside torchvision's.

All read the same JPEG files of 500 x 375 pixels, crops of scikit-learn's two photographs, and make the official
recipe's batches of 224 x 224 (random crop, flip) in one worker process. They take turns within one run. "uint8"
delivers bytes, as ours does; "float" also normalises on the host, as torchvision's reference does.
The rate is that of a core which the worker has to itself: pictures by the worker's own processor time, so that
what else the machine does counts little.
"""

import functools
import os
import statistics
import tempfile
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from benchmarks import results
from train.data import Augment, train_batches
from train.datasets import open_dataset

BATCH, BATCHES, TURNS = 32, 16, 15
REFERENCE = "torchvision, float"
QUALITY = 97  # about 100 kB, as large as ImageNet's


def run(task, arguments):
    if arguments:
        raise ValueError(f"input takes no options; got {' '.join(arguments)}")
    with tempfile.TemporaryDirectory() as folder:
        make_pictures(Path(folder))
        pipelines = {
            "res2net_jax": functools.partial(ours, resizer="pillow"),
            "res2net_jax, --resizer simd": functools.partial(ours, resizer="simd"),
            "torchvision, uint8": torchvision_uint8,
            REFERENCE: torchvision_float,
        }
        rates = {name: [] for name in pipelines}
        for _ in range(TURNS):
            for name, pipeline in pipelines.items():
                rates[name].append(rate(pipeline(folder)))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    rows = [("pipeline", "pictures / s / core", f"of {REFERENCE}")]
    rows += [(name, f"{value:.0f}", f"{value / medians[REFERENCE]:.2f}") for name, value in medians.items()]
    packages = ("grain", "pillow", "cykooz.resizer", "torch", "torchvision")
    print(results.write(task, rows, f"median of {TURNS} turns", packages, on_host=True))


def make_pictures(folder, count=BATCH * 8, names=128):
    """``count`` files, each under so many ``names``: a data set has more examples than we photographs."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    for i in range(count):
        picture = photographs[i % 2]
        left, top = rng.integers(0, picture.width - 500 + 1), rng.integers(0, picture.height - 375 + 1)
        target = folder / "ab"[i % 2]
        target.mkdir(exist_ok=True)
        picture.crop((left, top, left + 500, top + 375)).save(target / f"{i}.jpg", quality=QUALITY)
        for name in range(1, names):
            os.link(target / f"{i}.jpg", target / f"{i}-{name}.jpg")


def rate(batches):
    """Pictures per second of processor time, once the worker runs."""
    for _ in range(4):  # start-up, and what is prefetched
        next(batches)
    before = processor_time()
    for _ in range(BATCHES):
        next(batches)
    seconds = processor_time() - before
    if hasattr(batches, "close"):
        batches.close()
    return BATCH * BATCHES / seconds


def processor_time():
    """Seconds that the processes started by this one have computed."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(time.user + time.system for time in times)


def ours(folder, resizer):
    dataset, augment = open_dataset(f"folder:{folder}", "train"), Augment(resizer=resizer)
    return train_batches(dataset, size=224, batch_size=BATCH, seed=0, augment=augment, workers=1)


def torchvision_uint8(folder):
    from torchvision import transforms

    return torchvision_loader(folder, [transforms.PILToTensor()])


def torchvision_float(folder):
    from torchvision import transforms

    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return torchvision_loader(folder, [transforms.ToTensor(), normalize])


def torchvision_loader(folder, last):
    import torch
    from torchvision import datasets, transforms

    crop = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    dataset = datasets.ImageFolder(folder, transforms.Compose(crop + last))
    return iter(torch.utils.data.DataLoader(dataset, BATCH, shuffle=True, num_workers=1, drop_last=True))
