"""Features of pictures to a file: what they are, and that no kill changes the file."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import torch
from PIL import Image

import porting.twin
import res2net_jax
from res2net_jax.decoding import decoded
from res2net_jax.feature_file import FeatureFile
from res2net_jax.variants import Preprocessing

SMALL = {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32), "num_classes": 10, "zero_init_last": False}


@pytest.fixture(scope="module")
def model():
    model = res2net_jax.create("res2net50_26w_4s", **SMALL).eval()
    model.preprocessing = Preprocessing(size=32, crop_pct=1.0)
    return model


@pytest.fixture(scope="module")
def pictures(photos, tmp_path_factory):
    """Crops of photographs; two of them are no pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    images = [Image.open(photo) for photo in photos]
    for i in range(60):
        x, y = 9 * i, 6 * i
        images[i % 2].crop((x, y, x + 48, y + 40)).save(folder / f"p{i}.png")
    (folder / "p5.png").write_bytes(b"no picture")
    (folder / "p42.png").write_bytes((folder / "p41.png").read_bytes()[:500])
    return [folder / f"p{i}.png" for i in range(60)]


def test_a_model_that_does_not_pool_has_features_of_the_mean():
    model = res2net_jax.create("res2net50_26w_4s", **SMALL | {"num_classes": 0, "global_pool": ""}).eval()
    x = np.random.default_rng(0).standard_normal((2, 33, 40, 3)).astype("float32")
    extract = res2net_jax.feature_extractor
    expected = np.asarray(model(x)).mean((1, 2))
    np.testing.assert_allclose(extract(model)(x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(extract(model, "layer4")(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("stage", "pool"), [(None, True), ("layer3", True), ("act1", False)])
def test_features_equal_timm(stage, pool, x64):
    options = SMALL | {"global_pool": "avgmax", "param_dtype": "float64"}
    model = res2net_jax.create("res2net50_26w_4s", **options).eval()
    reference = porting.twin.timm_model(model).double().eval()
    porting.load_state_dict(model, reference.state_dict())  # rounded to float32 on the way
    x = np.random.default_rng(0).standard_normal((2, 33, 40, 3))
    with torch.inference_mode():
        last, maps = reference.forward_intermediates(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
        if stage is None:
            expected = reference.forward_head(last, pre_logits=True) if pool else last
        else:
            expected = maps[["act1", "layer1", "layer2", "layer3", "layer4"].index(stage)]
            expected = (expected.mean((2, 3)) + expected.amax((2, 3))) / 2 if pool else expected
    expected = expected.numpy() if expected.ndim == 2 else expected.numpy().transpose(0, 2, 3, 1)
    features = np.asarray(res2net_jax.feature_extractor(model, stage, pool=pool)(x))
    assert features.shape == expected.shape and features.dtype == np.float64
    assert np.abs(features - expected).max() < 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_rows_are_those_of_the_files(model, pictures, tmp_path, suffix):
    unreadable = res2net_jax.save_features(model, pictures, tmp_path / f"f{suffix}", batch_size=8)
    assert list(unreadable) == [str(pictures[5]), str(pictures[42])] and "not a picture" in unreadable[str(pictures[5])]
    if suffix == ".npz":
        with np.load(tmp_path / "f.npz") as content:
            rows, names = content["features"], content["files"].tolist()
    else:
        rows, described = np.load(tmp_path / "f.npy", mmap_mode="r"), json.loads((tmp_path / "f.json").read_text())
        names = described["files"]
        assert described["unreadable"].keys() == {"5", "42"} and described["stage"] == "layer4"
    assert names == list(map(str, pictures)) and rows.shape == (60, 128) and rows.dtype == np.float32
    broken = np.isnan(rows).all(axis=1)
    assert broken.nonzero()[0].tolist() == [5, 42] and np.isfinite(rows[~broken]).all()
    transform = res2net_jax.preprocess(model.preprocessing)
    some = [0, 7, 8, 41, 59]
    images = np.stack([transform(pictures[i]) for i in some])
    expected = jax.jit(lambda m, x: m.forward_head(m.forward_features(x), pre_logits=True))(model, images)
    assert np.abs(rows[some] - expected).max() < 1e-5 * np.abs(expected).max()
    assert {path.name for path in tmp_path.iterdir()} == {f"f{suffix}", f".f{suffix}.lock"} | (
        {"f.json"} if suffix == ".npy" else set()
    )


def test_maps_of_a_stage(model, pictures, tmp_path):
    res2net_jax.save_features(model, pictures[:3], tmp_path / "f.npy", "layer2", pool=False, batch_size=2)
    assert np.load(tmp_path / "f.npy").shape == (3, 4, 4, 64)


def test_a_command_that_was_killed_goes_on(model, pictures, tmp_path):
    res2net_jax.save(model, tmp_path / "m")
    res2net_jax.save_features(model, pictures, tmp_path / "whole.npy", batch_size=1)
    command = [sys.executable, "-m", "res2net_jax", "features", str(tmp_path / "m"), str(pictures[0].parent)]
    command += ["--output", str(tmp_path / "f.npy"), "--batch-size", "1", "--strict"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    progress = tmp_path / ".f.npy.part" / "progress.jsonl"
    while process.poll() is None and not (progress.exists() and progress.read_bytes().count(b"\n") > 10):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "f.npy").exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stdout.strip() == str(tmp_path / "f.npy")
    head, first, second = done.stderr.splitlines()
    assert head == "2 of 60 pictures could not be read; their rows are NaN:"
    assert "p5.png: not a picture" in first and "p42.png: not a picture" in second
    assert (tmp_path / "f.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "--force" in done.stderr


class Killed(BaseException):
    pass


@pytest.fixture
def killed(model, monkeypatch):
    """``killed(pictures, target)``: the features of pictures, killed before the file gets its name."""

    def kill(*_):
        raise Killed

    def run(pictures, target):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(FeatureFile, "finish", kill)
            res2net_jax.save_features(model, pictures, target, batch_size=2)

    return run


def test_other_pictures_of_the_same_names_are_not_continued(model, pictures, killed, tmp_path, monkeypatch):
    """Of the same size too, as bitmaps are."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for i in range(3):
            Image.open(pictures[i]).save(tmp_path / folder / f"{i}.bmp")
    target, names = tmp_path / "f.npy", ["0.bmp", "1.bmp", "2.bmp"]
    monkeypatch.chdir(tmp_path / "a")
    killed(names, target)
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(ValueError, match=r"\(files\).*--force"):
        res2net_jax.save_features(model, names, target, batch_size=2)
    monkeypatch.chdir(tmp_path / "a")
    Image.open(pictures[3]).save("1.bmp")
    with pytest.raises(ValueError, match=r"\(files: 1.bmp has changed since\).*--force"):
        res2net_jax.save_features(model, names, target, batch_size=2)
    assert res2net_jax.save_features(model, names, target, batch_size=2, overwrite=True) == {}


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_what_could_not_be_read_is_tried_again(model, pictures, killed, tmp_path, suffix):
    names = [tmp_path / f"{i}.png" for i in range(5)]
    for i in (0, 2, 4):
        shutil.copy(pictures[i], names[i])
    killed(names, tmp_path / f"f{suffix}")
    shutil.copy(pictures[3], names[3])
    whole, again = (
        res2net_jax.save_features(model, names, tmp_path / f"{name}{suffix}", batch_size=2) for name in ("whole", "f")
    )
    assert whole == again and list(again) == [str(names[1])]
    assert (tmp_path / f"f{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


def test_what_is_not_continued(model, pictures, killed, tmp_path):
    save = res2net_jax.save_features
    target = tmp_path / "f.npz"
    killed(pictures[:3], target)
    for pick, options, changed in (
        (slice(4), {"batch_size": 2}, r"files, shape|files"),
        (slice(3), {"batch_size": 3}, "batch_size"),
        (slice(3), {"batch_size": 2, "stage": "layer2"}, "stage, shape"),
    ):
        with pytest.raises(ValueError, match=rf"begun with other settings \(({changed})\).*--force"):
            save(model, pictures[pick], target, **options)
    for options in ({"act_layer": "silu"}, {"rngs": 1}):  # the same weights in another architecture, and others
        other = res2net_jax.create("res2net50_26w_4s", **options, **SMALL).eval()
        other.preprocessing = model.preprocessing
        with pytest.raises(ValueError, match=r"\(weights\)"):
            save(other, pictures[:3], target, batch_size=2)
    half = res2net_jax.create("res2net50_26w_4s", dtype="bfloat16", **SMALL).eval()
    half.preprocessing = dataclasses.replace(model.preprocessing, crop_pct=0.9)
    with pytest.raises(ValueError, match="dtype, preprocessing"):
        save(half, pictures[:3], target, batch_size=2)
    save(other, pictures[:4], target, batch_size=2, overwrite=True)
    with np.load(target) as content:
        assert content["features"].shape == (4, 128)
    with pytest.raises(FileExistsError, match="--force"):
        save(model, pictures[:3], target)
    (tmp_path / "g.json").write_text("{}")
    with pytest.raises(FileExistsError, match="g.json exists"):
        save(model, pictures[:3], tmp_path / "g.npy")


def test_what_has_no_features(model, pictures, tmp_path):
    with pytest.raises(ValueError, match="no stage 'layer9'; this model has act1, layer1, layer2, layer3, layer4"):
        res2net_jax.save_features(model, pictures, tmp_path / "f.npy", "layer9")
    with pytest.raises(ValueError, match=r"in .npy or .npz; got .*f.csv"):
        res2net_jax.save_features(model, pictures, tmp_path / "f.csv")
    with pytest.raises(ValueError, match="no pictures"):
        res2net_jax.save_features(model, [], tmp_path / "f.npy")
    with pytest.raises(ValueError, match="call model.eval"):
        res2net_jax.feature_extractor(res2net_jax.create("res2net50_26w_4s", **SMALL))
    with pytest.raises(PermissionError, match="cannot write"):
        res2net_jax.save_features(model, pictures, pictures[0] / "f.npy")
    with pytest.raises(ValueError, match="(?s)no picture can be read, so .*f.npy was not written:.*is a folder"):
        res2net_jax.save_features(model, [tmp_path, tmp_path / "none.jpg"], tmp_path / "f.npy")
    assert [path.name for path in tmp_path.iterdir()] == [".f.npy.lock"]


def test_one_picture_is_no_sequence(model, pictures, tmp_path):
    assert res2net_jax.save_features(model, str(pictures[0]), tmp_path / "f.npy", batch_size=1) == {}
    assert np.load(tmp_path / "f.npy").shape == (1, model.num_features)


def test_few_pictures_wait_at_a_time():
    begun = 0

    def numbers():
        nonlocal begun
        while begun < 100:
            begun += 1
            yield begun

    def slow(number):
        if number == 17:
            raise ValueError("broken")
        return number

    taken = 0
    for taken, answer in enumerate(decoded(numbers(), slow, ahead=8), start=1):
        assert begun <= taken + 7
        assert isinstance(answer, ValueError) if taken == 17 else answer == taken
    assert taken == 100
