"""The relatives of ImageNet: TFDS's own builders on small archives of the official layout, read and scored."""

import io
import json
import tarfile
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from res2net_jax.variants import Preprocessing
from train.data import eval_batches
from train.datasets import imagenet_synsets, open_dataset
from train.imagenet_subsets import IMAGENET_A, IMAGENET_R
from train.metrics import count
from train.prepare import prepare

SYNSETS = list(imagenet_synsets())


def picture(number):
    """A JPEG whose grey level is about 20 times its number."""
    file = io.BytesIO()
    Image.new("L", (40, 40), 20 * number).save(file, "JPEG")
    return file.getvalue()


def downloads(**methods):
    """TFDS's downloads, replaced by what is here."""
    import tensorflow_datasets as tfds

    return mock.patch.multiple(
        tfds.download.DownloadManager,
        **{name: lambda self, url, result=result: result for name, result in methods.items()},
    )


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
    with downloads(download_and_extract=str(tmp_path)):
        assert prepare(name, data_dir=str(tmp_path / "data")) == {"test": 3}
    dataset = open_dataset(name, "validation", data_dir=tmp_path / "data")
    assert (dataset.split, dataset.class_subset, dataset.class_names) == ("test", subset, None)
    assert dataset.num_classes == 1000 and read(dataset) == labels


def test_imagenet_v2_takes_the_matched_frequency_set(tmp_path):
    labels = {1: 0, 2: 10, 3: 9, 4: 999}
    top = tmp_path / "imagenetv2-matched-frequency-format-val"
    for number, label in labels.items():
        (top / str(label)).mkdir(parents=True)
        (top / str(label) / f"{number}.jpeg").write_bytes(picture(number))
    with downloads(download_and_extract=str(tmp_path)):
        assert prepare("imagenet_v2/matched-frequency", data_dir=str(tmp_path / "data")) == {"test": 4}
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
    members = [(f"sketch/{SYNSETS[label]}/sketch_{n}.JPEG", io.BytesIO(picture(n))) for n, label in labels.items()]
    with downloads(download="archive", iter_archive=members):
        assert prepare("imagenet_sketch", data_dir=str(tmp_path)) == {"test": 3}
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
    with downloads(download=str(tmp_path / "real.json")):
        counts = prepare("imagenet2012_real", data_dir=str(tmp_path / "data"), manual_dir=str(tmp_path))
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
