"""The relatives of ImageNet: TFDS's own builders on small archives of the official layout, read and scored."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from res2net_jax.variants import Preprocessing
from train.data import eval_batches
from train.datasets import imagenet_synsets, open_dataset
from train.imagenet_subsets import IMAGENET_A, IMAGENET_R
from train.metrics import count

SYNSETS = list(imagenet_synsets())


def picture(number):
    """A JPEG whose grey level is about 20 times its number."""
    file = io.BytesIO()
    Image.new("L", (40, 40), 20 * number).save(file, "JPEG")
    return file.getvalue()


PREPARE = """
import io, json, pathlib, sys
from unittest import mock
import tensorflow_datasets as tfds
from train.prepare import prepare

name, data_dir, manual_dir, downloads, archive = json.loads(sys.argv[1])
methods = {method: lambda self, url, path=path: path for method, path in downloads.items()}
if archive:
    files = sorted(path for path in pathlib.Path(archive).rglob("*") if path.is_file())
    members = [(str(path.relative_to(archive)), io.BytesIO(path.read_bytes())) for path in files]
    methods["iter_archive"] = lambda self, path: members
with mock.patch.multiple(tfds.download.DownloadManager, **methods):
    print(json.dumps(prepare(name, data_dir=data_dir, manual_dir=manual_dir)))
"""


def prepare(name, data_dir, manual_dir=None, archive=None, **downloads):
    """What train.prepare says with these paths in place of TFDS's downloads.

    In a process of its own: one that has imported TensorFlow crashes when it imports torch.
    """
    arguments = json.dumps([name, str(data_dir), manual_dir and str(manual_dir), downloads, archive and str(archive)])
    result = subprocess.run(
        [sys.executable, "-c", PREPARE, arguments],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def read(dataset):
    """Number of the picture -> its label."""
    return {
        round(np.asarray(Image.open(io.BytesIO(example["image"]))).mean() / 20): example["label"]
        for example in (dataset.source[i] for i in range(len(dataset)))
    }


@pytest.mark.parametrize(
    "name, folder, subset", [("imagenet_a", "imagenet-a", IMAGENET_A), ("imagenet_r", "imagenet-r", IMAGENET_R)]
)
def test_imagenet_a_and_r(tmp_path, name, folder, subset):
    labels = {1: subset[0], 2: subset[100], 3: subset[199]}
    for number, label in labels.items():
        (tmp_path / folder / SYNSETS[label]).mkdir(parents=True)
        (tmp_path / folder / SYNSETS[label] / f"{number}.jpg").write_bytes(picture(number))
    (tmp_path / folder / "README.txt").write_text("in the archive too")
    assert prepare(name, tmp_path / "data", download_and_extract=str(tmp_path)) == {"test": 3}
    dataset = open_dataset(name, "validation", data_dir=tmp_path / "data")
    assert (dataset.split, dataset.class_subset, dataset.class_names) == ("test", subset, None)
    assert dataset.num_classes == 1000 and read(dataset) == labels


def test_imagenet_v2_takes_the_matched_frequency_set(tmp_path):
    labels = {1: 0, 2: 10, 3: 9, 4: 999}
    top = tmp_path / "imagenetv2-matched-frequency-format-val"
    for number, label in labels.items():
        (top / str(label)).mkdir(parents=True)
        (top / str(label) / f"{number}.jpeg").write_bytes(picture(number))
    name = "imagenet_v2/matched-frequency"
    assert prepare(name, tmp_path / "data", download_and_extract=str(tmp_path)) == {"test": 4}
    dataset = open_dataset("imagenet_v2", "validation", data_dir=tmp_path / "data")
    assert dataset.class_names is None and dataset.class_subset is None and read(dataset) == labels
    # The archive's own folders, as folder:DIR, mean the same.
    for label in set(range(1000)) - set(labels.values()):
        (top / str(label)).mkdir()
        (top / str(label) / "x.jpeg").write_bytes(picture(12))
    by_folder = read(open_dataset(f"folder:{top}", "validation"))
    assert {number: by_folder[number] for number in labels} == labels


def test_imagenet_sketch(tmp_path):
    labels = {1: 0, 2: 500, 3: 999}
    for number, label in labels.items():
        file = tmp_path / "archive" / "sketch" / SYNSETS[label] / f"sketch_{number}.JPEG"
        file.parent.mkdir(parents=True)
        file.write_bytes(picture(number))
    assert prepare("imagenet_sketch", tmp_path, archive=tmp_path / "archive", download="archive") == {"test": 3}
    dataset = open_dataset("imagenet_sketch", "validation", data_dir=tmp_path)
    assert dataset.class_names is None and dataset.class_subset is None and read(dataset) == labels


def test_real_counts_any_label_and_skips_pictures_without_one(tmp_path):
    real = {1: [65, 970], 2: [], 3: [230], 4: [0, 1, 2, 3, 4, 5, 6, 7, 8]}
    with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar", "w") as tar:
        for number in real:
            member = tarfile.TarInfo(f"ILSVRC2012_val_{number:08d}.JPEG")
            member.size = len(picture(number))
            tar.addfile(member, io.BytesIO(picture(number)))
    (tmp_path / "real.json").write_text(json.dumps(list(real.values())))
    counts = prepare("imagenet2012_real", tmp_path / "data", tmp_path, download=str(tmp_path / "real.json"))
    assert counts == {"validation": 4}
    dataset = open_dataset("imagenet2012_real", "validation", data_dir=tmp_path / "data")
    assert dataset.multi_label and dataset.num_classes == 1000 and dataset.class_names is None
    assert read(dataset) == {number: tuple(labels) for number, labels in real.items()}
    (batch,) = eval_batches(dataset, preprocessing=Preprocessing(size=32), batch_size=6)
    logits = jnp.zeros((6, 1000)).at[:, 970].set(2.0).at[:, 230].set(1.0).at[:, 8].set(-0.5)
    # 1 is right at once, 3 as the second guess, 4 as the third; 2 has no label.
    assert {key: int(value) for key, value in count(logits, batch["label"], batch["mask"]).items()} == {
        "top1": 1,
        "top5": 3,
        "count": 3,
    }
