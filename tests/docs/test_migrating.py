"""The tables of docs/migrating.md: both sides of a row are evaluated and give the same."""

import copy
import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.numpy import save_file

import porting
import res2net_jax
from train import config

PAGE = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text("utf-8")
NAME = "res2net50d"
LAYERS, SCALE = (1, 1, 1, 1), 2  # as in the cache
TOLERANCE = 1e-10


def rows(*headings):
    """(left, right) of the rows of the first table under each heading."""
    for heading in headings:
        table = re.search(rf"## {heading}\n\n(?:[^|#\n].*\n\n)?((?:\|.*\n)+)", PAGE)[1]
        for line in table.splitlines()[2:]:
            yield tuple(cell.strip() for cell in line.strip("|").split(" | "))


def code(cells):
    return [re.fullmatch(r"`([^`]+)`", cell)[1] for cell in cells]


class Timm:
    """timm, whose ``pretrained=True`` reads our file, and whose models have as few layers as ours."""

    def __init__(self, file):
        self.file = str(file)

    def __getattr__(self, name):
        return getattr(timm, name)

    def create_model(self, name, **options):
        if options.get("pretrained"):
            options["pretrained_cfg_overlay"] = {"file": self.file}
        return timm.create_model(name, layers=LAYERS, block_args={"scale": SCALE}, **options).double()


class Ours:
    """res2net_jax in float64, whose models have as few layers as those in the cache."""

    def __getattr__(self, name):
        return getattr(res2net_jax, name)

    def create(self, name, **options):
        return res2net_jax.create(name, layers=LAYERS, scale=SCALE, **options)

    def load(self, name, **options):
        return res2net_jax.load(name, param_dtype="float64", **options)


@pytest.fixture(scope="module")
def sides(home, photos, tmp_path_factory):
    """What the names of the two columns mean."""
    file = tmp_path_factory.mktemp("timm") / "model.safetensors"
    folder = str(home / "models" / NAME)
    save_file({key: np.asarray(value) for key, value in porting.state_dict(res2net_jax.load(folder)).items()}, file)
    images = np.random.default_rng(0).standard_normal((2, 64, 64, 3))
    both = {"name": NAME, "picture": Image.open(photos[0])}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RES2NET_JAX_HOME", str(home))
        theirs = both | {"timm": Timm(file), "x": torch.from_numpy(images.transpose(0, 3, 1, 2).copy())}
        ours = both | {"res2net_jax": Ours(), "porting": porting, "x": images}
        theirs["model"] = theirs["timm"].create_model(NAME, pretrained=True).eval()
        yield theirs, ours


@pytest.fixture(scope="module")
def computed(sides):
    """What the right sides with images compute, by one program."""
    expressions = [right for _, right in map(code, rows("Using it")) if "(x" in right]
    _, ours = sides
    with jax.enable_x64(True):
        model = ours["res2net_jax"].load(NAME)
        run = jax.jit(lambda model, x: {right: eval(right, {"model": model, "x": x}) for right in expressions})
        return run(model, jnp.asarray(ours["x"]))


@pytest.mark.parametrize("row", map(code, rows("Making a model", "Using it")), ids=lambda row: row[0])
def test_both_sides_give_the_same(row, sides, computed, x64):
    left, right = row
    theirs, ours = (dict(side) for side in sides)
    theirs["model"] = copy.deepcopy(theirs["model"])
    if right not in computed:
        ours["model"] = ours["res2net_jax"].load(NAME)
    if "create(" in right:
        mine, other = eval(right, ours), eval(left, theirs)
        assert not mine.bn1.use_running_average and other.training
        assert {k: v.shape for k, v in porting.state_dict(mine).items()} == {
            k: tuple(v.shape) for k, v in other.state_dict().items() if "num_batches" not in k
        }
        return
    result = computed[right] if right in computed else eval(right, ours)
    with torch.no_grad():
        assert_same(eval(left, theirs), result, theirs["x"], jnp.asarray(ours["x"]))


def assert_same(theirs, ours, their_images, our_images):
    if isinstance(theirs, torch.nn.Module):
        run = jax.jit(lambda model, x: model(x))
        assert_same(theirs(their_images), run(ours, our_images), their_images, our_images)
    elif isinstance(theirs, torch.Tensor | np.ndarray):
        theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
        theirs = np.moveaxis(theirs, -3, -1) if theirs.ndim > 2 else theirs
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())
    elif isinstance(theirs, dict) and any(isinstance(value, torch.Tensor) for value in theirs.values()):
        assert set(theirs) - set(ours) == {key for key in theirs if key.endswith("num_batches_tracked")}
        for key, value in ours.items():
            np.testing.assert_array_equal(value, theirs[key])
    elif isinstance(theirs, list | tuple):
        assert len(theirs) == len(ours)
        for pair in zip(theirs, ours):
            assert_same(*pair, their_images, our_images)
    else:
        assert theirs == ours and type(theirs) is type(ours)


def test_options_of_the_architecture_are_all_named():
    text = PAGE.split("## Options of the architecture")[1].split("##")[0]
    others = {"create", "load", "block_args", "block_reduce_first", "fast", "prelu"}
    assert set(re.findall(r"`(\w+)`", text)) - others == {field.name for field in dataclasses.fields(res2net_jax.Arch)}


def test_switches_of_the_trainer_exist(capsys):
    with pytest.raises(SystemExit):
        config.parse(["paper", "--help"], "train")
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    ours = [cell for _, cell in rows("The trainer") if "train.evaluate" not in cell]
    assert {switch for cell in ours for switch in re.findall(r"--[\w-]+", cell)} <= known
