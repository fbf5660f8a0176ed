"""Batches: their order, their independence of workers and processes, and evaluation."""

import dataclasses
import itertools
import json
from collections import Counter, namedtuple

import numpy as np
import pytest
from batches import PLAIN, assert_same, take
from PIL import ExifTags, Image

from res2net_jax import preprocess
from res2net_jax.preprocess import normalize
from res2net_jax.variants import Preprocessing, get_variant
from train.data import Augment, eval_batches, steps_per_epoch, train_batches
from train.datasets import Dataset, open_dataset
from train.sources import Arrays


def numbered(n, num_classes=None, **options):
    """Pictures of one colour, their number in red and green: which example it was survives any crop."""
    images = np.zeros((n, 12, 12, 3), np.uint8)
    images[..., 0], images[..., 1] = (np.arange(n) % 256)[:, None, None], (np.arange(n) // 256)[:, None, None]
    labels = (np.arange(n) % (num_classes or n)).astype(np.int32)
    return Dataset("numbered", "train", Arrays("numbered", images, labels), num_classes or n, **options)


def numbers(batch):
    corner = batch["image"][:, 0, 0].astype(int)
    return (corner[:, 0] + 256 * corner[:, 1]).tolist()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of twelve JPEGs with texture, so that each crop and each flip is another picture."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(12):
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
        coarse.resize((80 + i, 60 + 2 * i), Image.Resampling.BICUBIC).save(root / "ab"[i % 2] / f"{i}.jpg")
    return open_dataset(f"folder:{root}", "train")


def test_an_epoch_holds_every_example_at_most_once_and_drops_the_rest():
    dataset = numbered(103)
    batches = take(train_batches(dataset, size=4, batch_size=10, seed=3, augment=PLAIN), 30)
    assert steps_per_epoch(dataset, 10) == 10
    epochs = [sum((numbers(batch) for batch in batches[e * 10 : e * 10 + 10]), []) for e in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == 100
    assert epochs[0] != epochs[1] != epochs[2]
    assert len({frozenset(epoch) for epoch in epochs}) == 3, "the same three examples were dropped each time"
    assert batches[0]["image"].shape == (10, 4, 4, 3) and batches[0]["image"].dtype == np.uint8
    assert batches[0]["label"].dtype == np.int32 and batches[0]["label"].tolist() == numbers(batches[0])


def test_the_seed_decides_order_and_distortion(photos):
    once, again, other = (take(train_batches(photos, size=24, batch_size=6, seed=seed), 4) for seed in (5, 5, 6))
    assert_same(once, again)
    assert not any(np.array_equal(a["image"], b["image"]) for a, b in zip(once, other, strict=True))


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(photos, workers):
    augment = Augment(rand_augment=9, color_jitter=0.4)
    some, none = (
        take(train_batches(photos, size=24, batch_size=4, seed=1, augment=augment, workers=n), 8) for n in (workers, 0)
    )
    assert_same(some, none)


@pytest.mark.parametrize(
    ("free", "least", "roomy"),
    [(2**40, 2**31, True), (2**20, 2**31, False), (2**21, 2**20, False), (2**22, 2**20, True)],
)
def test_large_batches_pass_with_and_without_room_in_shared_memory(photos, monkeypatch, free, least, roomy):
    # Ten batches of 8 x 128 x 128 x 3 bytes are between 2**21 and 2**22.
    usage = namedtuple("usage", "free")(free)
    monkeypatch.setattr("train.pipeline._MIN_SHARED_MEMORY", least)
    monkeypatch.setattr("train.pipeline.shutil.disk_usage", lambda path: usage)
    size = 128
    batches = train_batches(photos, size=size, batch_size=8, seed=1, workers=1)
    batch = next(batches)
    assert batch["image"].nbytes > 2**16
    shared = "Shared" in type(batch["image"].base).__name__
    assert shared == roomy
    assert_same([batch], take(train_batches(photos, size=size, batch_size=8, seed=1), 1))
    batches.close()


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_batch_that_one_would_have(photos, processes):
    whole = take(train_batches(photos, size=24, batch_size=6, seed=1), 5)
    shares = [
        take(
            train_batches(photos, size=24, batch_size=6 // processes, seed=1, process_index=i, process_count=processes),
            5,
        )
        for i in range(processes)
    ]
    joined = [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]} for parts in zip(*shares, strict=True)
    ]
    assert_same(joined, whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_any_step_can_be_the_first(photos, workers):
    whole = take(train_batches(photos, size=24, batch_size=5, seed=1), 9)
    late = take(train_batches(photos, size=24, batch_size=5, seed=1, start=6, workers=workers), 3)
    assert_same(late, whole[6:])


def test_state_is_the_number_of_the_next_step(photos):
    batches = train_batches(photos, size=24, batch_size=5, seed=1)
    first = [next(batches) for _ in range(3)]
    state = json.loads(json.dumps(batches.get_state()))
    assert state == {"step": 3, "replaced": 0}
    rest = take(batches, 4)
    other = train_batches(photos, size=24, batch_size=5, seed=1, workers=1)
    next(other)
    other.set_state(state)
    assert_same(take(other, 4), rest)
    assert first[0]["image"].shape == (5, 24, 24, 3)


def test_a_position_far_on_costs_nothing():
    batches = train_batches(numbered(1000), size=4, batch_size=8, seed=0, start=10**12, augment=PLAIN)
    assert len(set(numbers(take(batches, 1)[0]))) == 8


def test_flip_and_crop_are_drawn_for_each_picture():
    images = np.zeros((1, 8, 8, 1), np.uint8)
    images[0, :, 4:] = 255
    dataset = Dataset("half", "train", Arrays("half", images, np.zeros(1, np.int32)), 2, in_chans=1)
    whole = Augment(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.5)
    batches = take(train_batches(dataset, size=8, batch_size=1, seed=0, augment=whole), 400)
    flipped = np.mean([batch["image"][0, 0, 0, 0] == 255 for batch in batches])
    assert 0.4 < flipped < 0.6  # four standard deviations


@pytest.mark.parametrize("names, upright", [(("cat", "dog"), True), (("n01440764", "n01443537"), False)])
def test_photographs_are_turned_upright_unless_they_are_of_imagenets_classes(tmp_path, names, upright):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    orientation = Image.Exif()
    orientation[ExifTags.Base.Orientation] = 6  # the camera was held upright
    for name in names:
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "photo.png", exif=orientation)
    dataset = open_dataset(f"folder:{tmp_path}", "train")
    expected = np.rot90(pixels, -1) if upright else pixels
    setting = Preprocessing(size=32, crop_pct=1.0)
    evaluated = next(eval_batches(dataset, preprocessing=setting, batch_size=2))
    (trained,) = take(train_batches(dataset, size=32, batch_size=2, seed=0, augment=PLAIN), 1)
    assert all(np.array_equal(image, expected) for image in (*evaluated["image"], *trained["image"]))
    classified = preprocess(setting)(tmp_path / names[0] / "photo.png")
    assert np.array_equal(classified, normalize(Image.fromarray(expected), setting)) == upright


def test_grey_pictures_stay_grey():
    batch = take(train_batches(open_dataset("digits", "train"), size=32, batch_size=7, seed=0), 1)[0]
    assert batch["image"].shape == (7, 32, 32, 1) and batch["image"].max() > 100


# Evaluation


@pytest.mark.parametrize(
    "n, batch, processes, workers",
    [(103, 10, 1, 0), (103, 10, 3, 0), (100, 10, 2, 0), (3, 4, 2, 0), (1, 8, 1, 0), (103, 10, 1, 2), (3, 2, 2, 5)],
)
def test_every_example_is_evaluated_once(n, batch, processes, workers):
    shares = [
        list(
            eval_batches(
                numbered(n),
                preprocessing=Preprocessing(size=8, crop_pct=1.0),
                batch_size=batch,
                workers=workers,
                process_index=i,
                process_count=processes,
            )
        )
        for i in range(processes)
    ]
    assert len({len(share) for share in shares}) == 1
    seen = Counter()
    for batch_ in itertools.chain(*shares):
        assert batch_["image"].shape == (batch, 8, 8, 3) and batch_["mask"].dtype == bool
        seen.update(np.array(numbers(batch_))[batch_["mask"]].tolist())
        assert batch_["label"][batch_["mask"]].tolist() == np.array(numbers(batch_))[batch_["mask"]].tolist()
        assert (batch_["label"][~batch_["mask"]] == -1).all() and not batch_["image"][~batch_["mask"]].any()
    assert seen == Counter(range(n))


@pytest.mark.parametrize("name", ["res2net50_26w_4s", "res2net50d"])
def test_evaluated_pixels_are_those_of_the_published_transform(tmp_path, name):
    from sklearn.datasets import load_sample_images

    from train.augment import normalise

    setting = get_variant(name).preprocessing
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    china, flower = (Image.fromarray(image) for image in load_sample_images().images)
    china.save(tmp_path / "a" / "china.jpg")
    flower.rotate(90, expand=True).resize((233, 351)).save(tmp_path / "b" / "flower.jpg")
    dataset = open_dataset(f"folder:{tmp_path}", "validation")
    batch = next(eval_batches(dataset, preprocessing=setting, batch_size=2))
    ours = np.asarray(normalise(batch["image"], setting.mean, setting.std))
    for i in range(2):
        published = preprocess(name)(dataset.source[i]["image"])
        pixels = normalize(Image.fromarray(batch["image"][i]), setting)
        assert np.array_equal(pixels, published)
        assert np.abs(ours[i] - published).max() <= 2 * np.spacing(np.float32(2.7))


def test_multi_label_examples_come_as_one_bool_per_class():
    class Source:
        labels = [(3,), (), (0, 2, 4)]

        def __len__(self):
            return 3

        def __getitem__(self, i):
            return {"image": np.full((8, 8, 3), i, np.uint8), "label": self.labels[i]}

    dataset = Dataset("several", "validation", Source(), 5, multi_label=True)
    (batch,) = eval_batches(dataset, preprocessing=Preprocessing(size=8, crop_pct=1.0), batch_size=4)
    assert batch["label"].tolist() == [
        [False, False, False, True, False],
        [False] * 5,
        [True, False, True, False, True],
        [False] * 5,
    ]
    assert batch["mask"].tolist() == [True, True, True, False]
    with pytest.raises(ValueError, match="for evaluation only"):
        train_batches(dataset, size=8, batch_size=1, seed=0)


@pytest.mark.parametrize("label", [-1, 4, 1000])
def test_labels_outside_the_classes(label):
    dataset = dataclasses.replace(numbered(4), num_classes=4)
    dataset.source.labels[2] = label
    message = rf"label {label}; it has classes 0\.\.3"
    with pytest.raises(ValueError, match=message):
        take(train_batches(dataset, size=8, batch_size=4, seed=0), 1)
    with pytest.raises(ValueError, match=message):
        list(eval_batches(dataset, preprocessing=Preprocessing(size=8), batch_size=4))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 11}, "has 10 examples, fewer than one global batch of 11"),
        ({"batch_size": 4, "process_count": 3}, "fewer than one global batch of 12"),
        ({"batch_size": 0}, "at least one example; got 0"),
        ({"seed": -1}, r"seed must be in 0\.\."),
        ({"seed": 2**32}, r"seed must be in 0\.\."),
        ({"workers": -1}, "must not be negative"),
        ({"process_index": 1}, "process_index must be in range"),
        ({"interpolation": "lanczos3"}, "interpolation must be nearest or bilinear or bicubic"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        train_batches(numbered(10), **({"size": 8, "batch_size": 2, "seed": 0} | options))


@pytest.mark.parametrize(
    "options",
    [{"crop_scale": (0.5, 0.1)}, {"crop_ratio": (0, 1)}, {"flip": 2}, {"color_jitter": -1}, {"rand_augment": 31}],
)
def test_augmentations_out_of_range(options):
    with pytest.raises(ValueError, match="--" + next(iter(options)).replace("_", "-")):
        Augment(**options)
