"""Whether a resume goes on with the run that it finds."""

import dataclasses
import shutil

import numpy as np
import pytest
from PIL import Image

from train.config import RECIPES, Config, to_json
from train.data import Augment
from train.same_run import FOLDER, differences, require_same_run
from train.start import checksums, open_splits

from .conftest import arrays, of_pictures, small, steps, train


def test_a_resume_with_another_config_names_what_differs(tmp_path):
    assert train(small(tmp_path)) == 0
    before = arrays(tmp_path / "run")
    changed = small(tmp_path, momentum=0.8, channels=(16,), layers=(2,), log_every=3)
    changed = dataclasses.replace(changed, augment=dataclasses.replace(changed.augment, flip=0.5))
    with pytest.raises(ValueError) as caught:
        train(changed)
    first, *lines = str(caught.value).splitlines()
    assert "holds a run with another config; give another --output" in first
    assert sorted(line.split(":")[0].strip() for line in lines) == ["channels", "flip", "layers", "momentum"]
    assert "  momentum: the run has 0.9, this command 0.8" in lines
    after = arrays(tmp_path / "run")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    with pytest.raises(ValueError, match="To train its weights further: --pretrained --model .*run --output ANOTHER:"):
        train(small(tmp_path, epochs=99))


# All others decide something of what is learned.
FREE = [
    *("data_dir", "workers", "output", "steps", "keep", "checkpoint_every", "eval_every", "eval_batch_size"),
    *("log_every", "coordinator", "num_processes", "process_id", "dry_run", "fake_data"),
]


def resumes(config, saved):
    """Whether ``config`` continues a run of the config ``saved`` on the same data from the same weights."""
    facts = {"model": {"arch": {}}, "preprocessing": None}
    metadata, run = {"train": {"config": saved, "examples": 9}}, {"config": config, "examples": 9, "checksums": {}}
    try:
        require_same_run({**facts, **metadata}, facts, run, "run")
    except ValueError:
        return False
    return True


def test_only_switches_that_change_no_parameter_may_differ():
    config = RECIPES["digits"]()
    saved = to_json(config)
    others = {name: {**saved, name: "another"} for name in saved if name != "augment"}
    others |= {name: {**saved, "augment": {**saved["augment"], name: "another"}} for name in saved["augment"]}
    names = {field.name for switches in (Config, Augment) for field in dataclasses.fields(switches)}
    assert others.keys() == names - {"augment"}
    assert sorted(name for name in others if resumes(config, others[name])) == sorted(FREE)


def test_a_run_that_is_older_than_a_switch_goes_on():
    config = RECIPES["digits"]()
    saved = to_json(config)
    del saved["augment"]["resizer"], saved["drop_rate"]
    assert differences(saved, config) == []
    changed = dataclasses.replace(config, augment=dataclasses.replace(config.augment, resizer="simd"))
    assert differences(saved, changed) == ["resizer: the run has 'pillow', this command 'simd'"]


def test_a_resume_on_other_data_is_refused_and_leaves_the_checkpoints_alone(tmp_path, pictures):
    config = of_pictures(tmp_path, pictures)
    assert train(config) == 0
    before = arrays(tmp_path / "run")
    longer = dataclasses.replace(config, steps=4)

    def refused():
        with pytest.raises(ValueError, match="of the same config, but on other data or from other weights") as caught:
            train(longer)
        after = arrays(tmp_path / "run")
        assert steps(tmp_path / "run") == [2] and all(np.array_equal(before[name], after[name]) for name in before)
        return [line.strip() for line in str(caught.value).splitlines()[1:]]

    shutil.copy(pictures / "train/a/0.png", pictures / "train/a/more.png")
    assert refused() == ["examples: the run has 16, now there is 17"]
    (pictures / "train/a/more.png").rename(pictures / "train/a/0.png")
    (pictures / "train/a/1.png").rename(pictures / "train/a/9.png")
    assert [line.partition(":")[0] for line in refused()] == ["checksum of the pictures to learn from"]
    (pictures / "train/a/9.png").rename(pictures / "train/a/1.png")
    for split in ("train", "val"):
        (pictures / split / "b").rename(pictures / split / "d")
    assert refused() == ["class_names: the run has ['a', 'b'], now there is ['a', 'd']"]
    for split in ("train", "val"):
        shutil.copytree(pictures / split / "d", pictures / split / "b")
    assert refused()[0] == "num_classes: the run has 2, now there is 3"
    for split in ("train", "val"):
        shutil.rmtree(pictures / split / "d")
    assert train(longer) == 0
    pictures.rename(tmp_path / "moved")
    assert train(of_pictures(tmp_path, tmp_path / "moved", steps=6)) == 0 and max(steps(tmp_path / "run")) == 6
    shutil.copytree(tmp_path / "moved", pictures)
    Image.new("RGB", (99, 99)).save(pictures / "val/a/0.png")  # of the same name
    for other in (pictures, tmp_path / "third"):
        with pytest.raises(ValueError, match="with another config; .*\n  dataset: the run has 'folder:.*moved'"):
            train(of_pictures(tmp_path, other, steps=8))
        shutil.copytree(tmp_path / "moved", tmp_path / "third", dirs_exist_ok=True)
        (tmp_path / "third/val/a/0.png").unlink()
    (tmp_path / "moved/val/a/0.png").unlink()  # which was broken, say
    assert train(of_pictures(tmp_path, tmp_path / "moved", steps=8)) == 0


def test_a_folder_is_another_one_to_a_run_that_did_not_keep_the_sizes_of_its_pictures(tmp_path, pictures):
    run = {"config": of_pictures(tmp_path, tmp_path / "moved"), "examples": 16, "checksums": {}}
    saved = {
        "train": {"config": to_json(of_pictures(tmp_path, pictures)), "checksums": {"checksum of the pictures": 1}}
    }
    with pytest.raises(ValueError, match="with another config; .*\n  dataset: the run has 'folder:.*pictures'"):
        require_same_run(saved, {}, run, tmp_path)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_folder_is_known_elsewhere_by_the_sizes_of_its_pictures(tmp_path, pictures, split):
    def known(folder):
        config = of_pictures(tmp_path, folder)
        return checksums(config, None, *open_splits(config))[FOLDER]

    copy = shutil.copytree(pictures, tmp_path / "copy")
    assert known(copy) == known(pictures)
    Image.new("RGB", (99, 99)).save(copy / split / "a/0.png")
    assert known(copy) != known(pictures)
