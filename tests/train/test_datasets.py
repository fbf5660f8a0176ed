"""Names to data sets: what is found, and what is said when it is not there or not what it should be."""

import dataclasses
import os
import pickle

import numpy as np
import pytest
from PIL import Image

import res2net_jax
from train.config import Config
from train.datasets import imagenet_synsets, open_dataset, resolve_split
from train.imagenet_subsets import IMAGENET_A
from train.start import introduction, open_splits


def make_folder(root, tree):
    """``{"class": ["a.png", ...]}``; every picture gets a colour of its own."""
    number = 0
    for label, files in tree.items():
        (root / label).mkdir(parents=True, exist_ok=True)
        for file in files:
            (root / label / file).parent.mkdir(parents=True, exist_ok=True)
            number += 1
            if file.endswith((".png", ".JPG", ".jpeg")):
                Image.new("RGB", (12, 10), (number, 0, 0)).save(root / label / file)
            else:
                (root / label / file).write_text("no picture")
    return root


def test_digits_are_split_evenly_and_for_good():
    train, test = open_dataset("digits", "train"), open_dataset("digits", "test")
    assert (len(train), len(test)) == (1442, 355)
    assert train.num_classes == 10 and train.in_chans == 1 and train.class_names == tuple("0123456789")
    for labels, part in ((train.source.labels, 0.8), (test.source.labels, 0.2)):
        assert np.abs(np.bincount(labels) - part * 180).max() < 5
    first = test.source[0]
    assert first["image"].shape == (8, 8, 1) and first["image"].dtype == np.uint8
    everything = {image.tobytes() for image in np.concatenate([train.source.images, test.source.images])}
    assert len(everything) == len(train) + len(test), "a picture of one split is in the other"
    assert train.source.images.max() == 255 and train.source.images.min() == 0


def test_digits_validation_is_the_test_split():
    assert open_dataset("digits", "validation").split == "test"


def test_folder_classes_are_sub_folders(tmp_path):
    make_folder(tmp_path, {"zèbre ☂": ["b.png", "a.JPG"], "a cat": ["deep/x.jpeg", "notes.txt"], ".git": ["x.png"]})
    dataset = open_dataset(f"folder:{tmp_path}", "train")
    assert dataset.class_names == ("a cat", "zèbre ☂") and dataset.num_classes == 2 and dataset.split == "all"
    examples = [dataset.source[i] for i in range(len(dataset))]
    assert [example["label"] for example in examples] == [0, 1, 1]
    assert dataset.source.name(1) == str(tmp_path / "zèbre ☂" / "a.JPG")
    assert examples[1]["image"] == (tmp_path / "zèbre ☂" / "a.JPG").read_bytes()
    again = pickle.loads(pickle.dumps(dataset))
    assert again.source[2] == dataset.source[2]


def test_classes_of_a_folder_are_in_the_order_of_timm(tmp_path):
    from timm.data.readers.reader_image_folder import find_images_and_targets

    names = (
        "class1",
        "class2",
        "class10",
        "Class3",
        "03",
        "b",
        "B2",
        "10",
        "a 2 b",
        "a 10 b",
        "é",
        "_",
        "ß",
        "sz",
        "a٣",
    )
    make_folder(tmp_path, {name: ["x.png"] for name in (*names, "a٣", "ss")})
    _, theirs = find_images_and_targets(str(tmp_path))
    assert open_dataset(f"folder:{tmp_path}", "train").class_names == tuple(sorted(theirs, key=theirs.get))


def test_folder_with_splits(tmp_path):
    make_folder(tmp_path / "train", {"a": ["1.png"], "b": ["2.png"], "c": ["3.png"]})
    make_folder(tmp_path / "val", {"b": ["4.png"], "c": ["5.png"]})
    train = open_dataset(f"folder:{tmp_path}", "train")
    assert train.split == "train" and len(train) == 3
    for split in ("validation", "test"):
        validation = open_dataset(f"folder:{tmp_path}", split)
        assert validation.split == "validation"
        assert validation.class_names == ("a", "b", "c") and validation.source.labels.tolist() == [1, 2]


def test_parts_of_a_folder(tmp_path):
    make_folder(tmp_path, {"a": [f"{i}.png" for i in range(5)], "b": [f"{i}.png" for i in range(4)]})
    parts = [open_dataset(f"folder:{tmp_path}", split) for split in ("train[:75%]", "validation[75%:]", "all[25%:50%]")]
    assert [part.split for part in parts] == ["all[0%:75%]", "all[75%:100%]", "all[25%:50%]"]
    names = [[os.path.relpath(part.source.name(i), tmp_path) for i in range(len(part))] for part in parts]
    assert names[0] == ["a/0.png", "a/1.png", "a/2.png", "a/3.png", "b/0.png", "b/1.png", "b/2.png"]
    assert names[1] == ["a/4.png", "b/3.png"] and names[2] == ["a/1.png", "b/1.png"]
    assert {part.class_names for part in parts} == {("a", "b")}
    with pytest.raises(ValueError, match=r"without a picture in all\[0%:12%\]: b"):
        open_dataset(f"folder:{tmp_path}", "train[:12%]")
    for split in ("train[:0%]", "train[3:]", "train[:120%]", "train[50%:50%]", "train[:80%"):
        with pytest.raises(ValueError, match="is in per cent, as train"):
            open_dataset(f"folder:{tmp_path}", split)


def test_parts_of_a_folder_do_not_overlap(tmp_path):
    make_folder(tmp_path, {"a": [f"{i}.png" for i in range(4)], "b": [f"{i}.png" for i in range(4)]})
    config = Config(dataset=f"folder:{tmp_path}", train_split="all[:50%]", eval_split="all[50%:]")
    train, held_out = open_splits(config)
    assert len(train) == len(held_out) == 4
    message = r'on the same pictures .*--train-split "all\[:80%\]" --eval-split "all\[80'
    for splits in ({"train_split": "all[:75%]"}, {"train_split": "all"}, {"eval_split": "all"}):
        with pytest.raises(ValueError, match=message):
            open_splits(dataclasses.replace(config, **splits))


@pytest.mark.parametrize("held_out", ["val", "valid", "validation"])
def test_names_of_the_validation_folder(tmp_path, held_out):
    make_folder(tmp_path / "train", {"a": ["1.png"], "b": ["2.png"]})
    make_folder(tmp_path / held_out, {"a": ["3.png"], "b": ["4.png", "5.png"]})
    make_folder(tmp_path / "test", {"a": ["6.png"], "b": ["7.png"]})
    assert [len(open_dataset(f"folder:{tmp_path}", split)) for split in ("train", "validation", "test")] == [2, 3, 2]


def test_a_link_to_nowhere_is_a_picture_that_cannot_be_read(tmp_path):
    make_folder(tmp_path, {"a": ["1.png"], "b": ["2.png"]})
    (tmp_path / "b/3.png").symlink_to(tmp_path / "gone.png")
    assert len(open_dataset(f"folder:{tmp_path}", "train")) == 3


def test_links_are_followed_but_not_in_circles(tmp_path):
    make_folder(tmp_path / "data", {"a": ["1.png"], "b": ["2.png"]})
    make_folder(tmp_path / "elsewhere", {"more": ["3.png"]})
    (tmp_path / "data/a/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/a/itself").symlink_to(tmp_path / "data/a")
    (tmp_path / "elsewhere/more/back").symlink_to(tmp_path / "data/a")
    assert open_dataset(f"folder:{tmp_path / 'data'}", "train").source.labels.tolist() == [0, 0, 1]


def test_a_class_called_train_is_a_class(tmp_path):
    make_folder(tmp_path, {"bus": ["1.png"], "train": ["2.png"]})
    assert open_dataset(f"folder:{tmp_path}", "validation").class_names == ("bus", "train")


def introduced(dataset):
    """The lines that begin a run on ``dataset``."""
    options = {"num_classes": dataset.num_classes, "layers": (1,), "channels": (8,)}
    model = res2net_jax.create("res2net50_26w_4s", **options)
    return introduction(Config(), model, dataset, dataset, steps_per_epoch=1, done=0, total=1).splitlines()


def test_synset_folders_get_imagenets_labels(tmp_path):
    synsets = list(imagenet_synsets())
    assert len(synsets) == 1000
    make_folder(tmp_path, {synsets[7]: ["1.png"], synsets[999]: ["2.png"]})
    dataset = open_dataset(f"folder:{tmp_path}", "validation")
    assert dataset.num_classes == 1000 and dataset.class_names is None and dataset.class_subset is None
    assert dataset.source.labels.tolist() == [7, 999]
    told = "2 of ImageNet's 1000 classes; the model has 1000 outputs"
    assert told in introduced(dataset) and "outputs" not in introduced(open_dataset("digits", "train"))
    make_folder(tmp_path, {"other": ["1.png"]})
    assert open_dataset(f"folder:{tmp_path}", "validation").num_classes == 3


def test_the_classes_of_imagenet_a_are_scored_among_themselves(tmp_path):
    synsets = list(imagenet_synsets())
    make_folder(tmp_path, {synsets[label]: ["1.png"] for label in IMAGENET_A})
    dataset = open_dataset(f"folder:{tmp_path}", "validation")
    assert dataset.class_subset == IMAGENET_A and dataset.source.labels.tolist() == list(IMAGENET_A)


def test_numbered_folders_count_as_numbers(tmp_path):
    make_folder(tmp_path / "few", {str(n): ["1.png"] for n in (0, 2, 10)})
    assert open_dataset(f"folder:{tmp_path / 'few'}", "test").class_names == ("0", "2", "10")
    make_folder(tmp_path / "v2", {str(n): ["1.png"] for n in range(1000)})
    v2 = open_dataset(f"folder:{tmp_path / 'v2'}", "test")
    assert v2.num_classes == 1000 and v2.class_names is None and v2.source.labels.tolist() == list(range(1000))


@pytest.mark.parametrize(
    "tree, message",
    [
        ({}, "has no sub-folders; expected one for each class"),
        ({"a": [], "b": []}, "holds no pictures"),
        ({"a": ["notes.txt"], "b": ["notes.txt"]}, "holds no pictures.*known are .jpg"),
        ({"a": ["1.png"], "b": [], "c": ["x.txt"]}, "classes without a picture: b, c"),
        ({"only": ["1.png"]}, "has one class, only"),
    ],
)
def test_folders_that_are_no_data_set(tmp_path, tree, message):
    make_folder(tmp_path, tree)
    with pytest.raises(ValueError, match=message):
        open_dataset(f"folder:{tmp_path}", "train")


@pytest.mark.parametrize("folder", ["val", "valid", "validation"])
def test_the_held_out_folder_goes_by_all_of_its_names(tmp_path, folder):
    make_folder(tmp_path / "train", {"a": ["1.png"], "b": ["2.png"]})
    make_folder(tmp_path / folder, {"a": ["4.png"], "b": ["5.png"]})
    for split in ("val", "valid", "validation"):
        dataset = open_dataset(f"folder:{tmp_path}", split)
        assert dataset.split == "validation" and dataset.source.root == str(tmp_path / folder)


def test_validation_classes_that_were_never_trained(tmp_path):
    make_folder(tmp_path / "train", {"a": ["1.png"], "b": ["2.png"]})
    make_folder(tmp_path / "val", {"a": ["4.png"], "new": ["5.png"]})
    with pytest.raises(ValueError, match="classes that the training folder lacks: new"):
        open_dataset(f"folder:{tmp_path}", "validation")


def test_a_folder_name_that_is_no_text(tmp_path):
    make_folder(tmp_path, {"a": ["1.png"]})
    broken = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    try:
        os.mkdir(broken)
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    with pytest.raises(ValueError, match=r"names are not UTF-8: 'caf\\udce9'. Rename them"):
        open_dataset(f"folder:{tmp_path}", "train")


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        open_dataset(f"folder:{tmp_path}/nowhere", "train")


@pytest.mark.parametrize("split", ["valid", "", "TRAIN"])
def test_wrong_split_lists_the_right_ones(split):
    with pytest.raises(ValueError, match=f"digits has no split '{split}'; it has train, test"):
        open_dataset("digits", split)


def test_test_and_validation_stand_in_for_each_other_but_not_for_train():
    assert resolve_split("x", "test", ("train", "validation")) == "validation"
    assert resolve_split("x", "validation", ("validation", "test")) == "validation"
    with pytest.raises(ValueError, match="it has test"):
        resolve_split("x", "train", ("test",))


def test_set_that_was_never_prepared(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no prepared data set 'imagenet2012'.*python -m train.prepare"):
        open_dataset("imagenet2012", "train", data_dir=tmp_path)
    (tmp_path / "imagenet2012" / "5.1.0").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="holds imagenet2012. Did you mean imagenet2012?"):
        open_dataset("imagenet2021", "train", data_dir=tmp_path)


def test_half_prepared_set(tmp_path):
    (tmp_path / "imagenet2012" / "incomplete.1B2C_5.1.0").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="half prepared: .*incomplete.1B2C.*Remove it and prepare again"):
        open_dataset("imagenet2012", "train", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["own", "./own"])
def test_folder_without_its_prefix(tmp_path, monkeypatch, name):
    (tmp_path / "own").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=f"[dD]id you mean folder:{name}?"):
        open_dataset(name, "train", data_dir=tmp_path / "sets")


def test_nonsense_name(tmp_path):
    with pytest.raises(ValueError, match="not the name of a data set"):
        open_dataset("../etc", "train", data_dir=tmp_path)
