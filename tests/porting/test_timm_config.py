"""What timm keeps beside weights on the hub: written by timm, read by ``load``."""

import json
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

import porting
import res2net_jax
from porting import download, timm_config
from porting.sources import Release
from res2net_jax.arch import Arch

NAME = "res2net50_26w_4s"
COMMIT = "0" * 40
NAMES = ["ox-eye daisy", "Löwenzahn", "tulip"]
SHAPE = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}
SETTING = {
    "input_size": (3, 96, 96),
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands for the hub's cache; ``me/flowers`` is a fine-tune of timm's in it."""
    folder = tmp_path / "hub" / COMMIT
    folder.mkdir(parents=True)
    model = timm.create_model(NAME, num_classes=3, act_layer="silu", block_args={"scale": 2}, **SHAPE)
    save_file(model.state_dict(), folder / "model.safetensors")
    save_config_for_hf(model, folder / "config.json", {"label_names": NAMES}, data_config=SETTING)

    def from_hub(repo, revision=None, file="model.safetensors", *, cache_dir=None):
        if not (folder / file).is_file():
            raise FileNotFoundError(file)
        return folder / file

    monkeypatch.setattr(download, "from_hub", from_hub)
    return folder, model.eval()


def test_a_fine_tune_of_timm_s_brings_its_classes_its_pictures_and_its_options(hub, tmp_path, photos):
    _, theirs = hub
    model = res2net_jax.load(NAME, source="me/flowers", cache_dir=tmp_path / "home")
    assert model.class_names == tuple(NAMES)
    transform = timm.data.create_transform(**SETTING)
    expected = transform(Image.open(photos[0]))
    image = res2net_jax.preprocess(model)(photos[0])
    assert np.array_equal(image, expected.numpy().transpose(1, 2, 0))
    with torch.no_grad():
        logits = theirs(expected[None]).numpy()
    assert np.abs(model(image[None]) - logits).max() < 1e-4 * np.abs(logits).max()


def test_names_by_the_numbers_of_their_classes():
    names = {str(i): name for i, name in enumerate(NAMES)}
    assert timm_config.class_names({"label_names": dict(reversed(names.items()))}, 3) == tuple(NAMES)
    assert timm_config.class_names({"label_names": {"0": "a", "2": "b"}}, 2) is None  # with a gap


def test_what_was_asked_for_wins(hub, tmp_path):
    model = res2net_jax.load(NAME, source="me/flowers", cache_dir=tmp_path / "home", act_layer="relu", num_classes=7)
    assert model.arch.act_layer == "relu" and model.class_names is None
    assert model.preprocessing.size == SETTING["input_size"][1]


def test_options_of_another_model(hub, tmp_path):
    folder, _ = hub
    config = json.loads((folder / "config.json").read_bytes())
    config["model_args"]["norm_layer"] = "groupnorm"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json, beside the weights, asks .*: .*its norms are BatchNorm"):
        porting.port(NAME, "me/flowers", tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


def test_without_a_config_the_release_s_is_taken(hub, tmp_path):
    folder, _ = hub
    (folder / "config.json").unlink()
    options = {**SHAPE, "scale": 2}
    model = res2net_jax.load(NAME, source="me/flowers", cache_dir=tmp_path / "home", **options)
    assert (model.class_names, model.preprocessing, model.arch.act_layer) == (None, None, "relu")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"model_args": null}', '{"pretrained_cfg": []}', '{"label_names": {"1": "a"}}']
)
def test_a_config_that_says_nothing(hub, text):
    folder, _ = hub
    (folder / "config.json").write_text(text)
    release = Release(folder / "model.safetensors", f"hf://me/flowers@{COMMIT}", "")
    if text == "{":
        with pytest.warns(UserWarning, match=re.escape(f"config.json of hf://me/flowers@{COMMIT} cannot be read")):
            config = timm_config.read(release)
    else:
        config = timm_config.read(release)
    usual = res2net_jax.Preprocessing()
    assert timm_config.apply(config, Arch(), ()) == Arch()
    assert timm_config.preprocessing(config, usual) is None
    assert timm_config.class_names(config, 1) is None


@pytest.mark.parametrize(
    "changed", [{"input_size": [3, 96, 128]}, {"crop_mode": "border"}, {"interpolation": "nearest"}, {"crop_pct": "x"}]
)
def test_pictures_that_are_not_made_here(changed):
    with pytest.warns(UserWarning, match="in a way that is not available here"):
        setting = timm_config.preprocessing({"pretrained_cfg": SETTING | changed}, res2net_jax.Preprocessing())
    assert setting is None
