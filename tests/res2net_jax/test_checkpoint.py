import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import res2net_jax
from res2net_jax import Arch, Res2Net, checkpoint, files
from res2net_jax.init import initialize, variables
from res2net_jax.metadata import read_metadata
from res2net_jax.variants import Preprocessing

SMALL = {"layers": (1, 1), "channels": (16, 32)}


@pytest.fixture
def model():
    return res2net_jax.create("res2net50_26w_4s", num_classes=5, **SMALL).eval()


def same(a, b):
    a, b = checkpoint.arrays(a), checkpoint.arrays(b)
    return a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


def test_a_saved_model_comes_back(model, tmp_path):
    folder = res2net_jax.save(model, tmp_path / "new" / "m")
    loaded = res2net_jax.load(folder)
    assert same(loaded, model)
    assert (loaded.name, loaded.arch, loaded.num_classes) == (model.name, model.arch, 5)
    x = jnp.ones((1, 32, 32, 3))
    assert np.array_equal(jax.jit(lambda m, x: m(x))(loaded, x), jax.jit(lambda m, x: m(x))(model, x))
    assert sorted(p.name for p in folder.parent.iterdir()) == [".m.lock", "m"]
    assert read_metadata(folder)["certificate"]["certified"] is False


def test_a_folder_of_steps_is_its_newest_and_so_is_the_run_s(model, tmp_path):
    for step in (9, 10):
        model.fc.bias.set_value(jnp.full(5, float(step)))
        res2net_jax.save(model, tmp_path / "run" / "checkpoints" / str(step))
    for folder in ("run/checkpoints", "run"):
        assert res2net_jax.load(tmp_path / folder).fc.bias[0] == 10
    steps = tmp_path / "run" / "checkpoints"
    (steps / "10").rename(steps / "10.old")  # while it is saved again
    assert res2net_jax.load(tmp_path / "run").fc.bias[0] == 10
    model.fc.bias.set_value(jnp.full(5, 10.5))
    res2net_jax.save(model, steps / "10")
    assert res2net_jax.load(tmp_path / "run").fc.bias[0] == 10.5


def test_options(model, tmp_path):
    folder = res2net_jax.save(model, tmp_path / "m")
    x = np.random.default_rng(0).standard_normal((2, 32, 32, 1)).astype("float32")

    grey = res2net_jax.load(folder, in_chans=1)
    assert np.allclose(grey(x), model(jnp.repeat(x, 3, axis=-1)), atol=1e-5)

    seven = res2net_jax.load(folder, num_classes=7)
    assert seven(jnp.zeros((1, 32, 32, 3))).shape == (1, 7)
    assert seven.conv1.kernel.shape == model.conv1.kernel.shape and np.array_equal(
        seven.conv1.kernel[...], model.conv1.kernel[...]
    )
    headless = res2net_jax.load(folder, num_classes=0)
    assert headless(jnp.zeros((1, 32, 32, 3))).shape == (1, 128)

    half = res2net_jax.load(folder, dtype=jnp.bfloat16)
    assert half(jnp.zeros((1, 32, 32, 3))).dtype == jnp.bfloat16
    assert half.fc.kernel.dtype == jnp.float32
    assert res2net_jax.load(folder, param_dtype=jnp.bfloat16).fc.kernel.dtype == jnp.bfloat16


@pytest.mark.parametrize("in_chans", [1, 2, 4, 5, 7])
def test_first_convolution_for_other_channels_equals_timm(in_chans):
    import timm.models
    import torch

    from res2net_jax.adapt import fit_first_conv

    kernel = np.random.default_rng(0).standard_normal((7, 7, 3, 8)).astype("float32")
    theirs = timm.models.adapt_input_conv(in_chans, torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()))
    assert np.allclose(fit_first_conv(jnp.asarray(kernel), in_chans), theirs.numpy().transpose(2, 3, 1, 0), atol=1e-6)


def test_a_mistake_is_reported_once(model, tmp_path, monkeypatch):
    res2net_jax.save(model, tmp_path / "m")
    reads, restore = [], checkpoint.restore
    monkeypatch.setattr(checkpoint, "restore", lambda *args, **options: reads.append(args) or restore(*args, **options))
    with pytest.raises(ValueError, match="do not fit") as caught:
        res2net_jax.load(tmp_path / "m", base_width=14)
    assert caught.value.__context__ is None and len(reads) == 1


def test_an_override_that_the_weights_do_not_fit(model, tmp_path):
    folder = res2net_jax.save(model, tmp_path / "m")
    with pytest.raises(ValueError, match=r"layer1.0.convs.0.kernel: wanted \(3, 3, 4, 4\), have \(3, 3, 6, 6\)"):
        res2net_jax.load(folder, base_width=16, scale=6)
    with pytest.raises(ValueError, match="no option 'depth'"):
        res2net_jax.load(folder, depth=3)
    with pytest.raises(ValueError, match="'pretrained'; load gives trained weights, create fresh ones"):
        res2net_jax.load(folder, pretrained=True)


def test_what_is_no_checkpoint(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        res2net_jax.load(tmp_path / "none")
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is not a checkpoint"):
        res2net_jax.load(tmp_path / "empty")

    from orbax.checkpoint import v1 as ocp

    ocp.save(tmp_path / "other", {"a": jnp.zeros(3)})
    with pytest.raises(ValueError, match="not one of a Res2Net"):
        res2net_jax.load(tmp_path / "other")


def test_a_later_format_and_damage(model, tmp_path):
    folder = res2net_jax.save(model, tmp_path / "m")
    file = folder / "_CHECKPOINT_METADATA"
    metadata = json.loads(file.read_text())
    metadata["custom_metadata"]["format"] = 99
    file.write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="format 99; this version of res2net_jax reads format 1"):
        res2net_jax.load(folder)
    metadata["custom_metadata"]["format"] = 1
    file.write_text(json.dumps(metadata))
    for data in (folder / "model").rglob("d/*"):
        data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged; take another one. Orbax says: .*[Bb]yte range") as caught:
        res2net_jax.load(folder)
    assert "handler" not in str(caught.value)
    try:
        raise KeyError("of the caller")
    except KeyError:
        with pytest.raises(ValueError, match="Orbax says: .*[Bb]yte range"):
            res2net_jax.load(folder)
    metadata["custom_metadata"]["source"]["origin"] = "hf://timm/res2net50_26w_4s.in1k"
    file.write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="damaged; delete it and port it again .python -m porting res2net50_26w_4s"):
        res2net_jax.load(folder)
    file.write_text(file.read_text()[:40])
    with pytest.raises(ValueError, match="or it is damaged"):
        res2net_jax.load(folder)


def test_a_description_that_is_not_of_a_model(model, tmp_path):
    folder = res2net_jax.save(model, tmp_path / "m")
    file = folder / "_CHECKPOINT_METADATA"
    saved = file.read_text()

    def described_as(**changes):
        metadata = json.loads(saved)
        metadata["custom_metadata"] |= changes
        file.write_text(json.dumps(metadata))
        return metadata["custom_metadata"]["model"]

    described = described_as(source=None)
    with pytest.raises(ValueError, match="not one of a Res2Net"):
        res2net_jax.load(folder)
    for arch in (described["arch"] | {"later": 1}, described["arch"] | {"layers": 3}, ["layers"], None):
        described_as(model=described | {"arch": arch})
        with pytest.raises(ValueError, match=r"m describes a model that .* does not know, or it is damaged \(.+\)"):
            res2net_jax.load(folder)
    described_as(crc32=None)
    assert same(res2net_jax.load(folder), model)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_a_flipped_bit_is_damage(tmp_path, param_dtype):
    model = res2net_jax.create("res2net50_26w_4s", num_classes=5, param_dtype=param_dtype, **SMALL)
    folder = res2net_jax.save(model, tmp_path / "m")
    assert same(res2net_jax.load(folder), model)
    file = max((folder / "model").rglob("d/*"), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x40
    file.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        res2net_jax.load(folder)
    metadata = json.loads((folder / "_CHECKPOINT_METADATA").read_text())
    assert len(metadata["custom_metadata"].pop("crc32")) == len(variables(model))
    (folder / "_CHECKPOINT_METADATA").write_text(
        json.dumps(metadata)
    )  # as of an earlier version: nothing to tell it by
    assert not same(res2net_jax.load(folder), model)


def test_arrays_of_another_type_than_the_model_says_are_no_damage(model, tmp_path):
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model)))
    loaded = res2net_jax.load(res2net_jax.save(model, tmp_path / "m"))
    assert loaded.fc.kernel.dtype == jnp.float32
    assert np.array_equal(loaded.fc.kernel[...], model.fc.kernel[...].astype(jnp.float32))


def test_what_is_beside_a_model_is_not_lost_with_it(model, tmp_path):
    folder = res2net_jax.save(model, tmp_path / "m")
    (folder / ".DS_Store").touch()
    res2net_jax.save(model, folder, overwrite=True)
    (folder / "checkpoints").mkdir()
    with pytest.raises(FileExistsError, match=r"holds more than a model \(checkpoints\), so it is left alone"):
        res2net_jax.save(model, folder, overwrite=True)
    assert (folder / "checkpoints").exists() and same(res2net_jax.load(folder), model)


def test_what_cannot_be_saved(tmp_path):
    pyramid = res2net_jax.create("res2net50_26w_4s", features_only=True, out_indices=(0, 1), **SMALL)
    with pytest.raises(TypeError, match="expected a Res2Net; got a FeaturePyramid, which was cut to a backbone"):
        res2net_jax.save(pyramid, tmp_path / "m")
    with pytest.raises(ValueError, match="cut to a backbone; keep nnx.state"):
        res2net_jax.save(pyramid.backbone, tmp_path / "m")
    with pytest.raises(ValueError, match="only describes itself"):
        res2net_jax.save(Res2Net(Arch(**SMALL)), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_bucket_is_no_folder(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for act in (lambda: res2net_jax.save(model, "gs://bucket/m"), lambda: res2net_jax.load("gs://bucket/m")):
        with pytest.raises(ValueError, match="gs://bucket/m is an address, where a path is expected"):
            act()
    with pytest.raises(ValueError, match="is an address"):
        res2net_jax.export(model, "s3://bucket/m.stablehlo")
    assert not list(tmp_path.iterdir())


def test_sharded_load_puts_the_arrays_on_every_device(model, tmp_path):
    folder = res2net_jax.save(model, tmp_path / "m")
    program = f"""
import jax, numpy as np, res2net_jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
model = res2net_jax.load({str(folder)!r}, sharding=NamedSharding(mesh, P()), num_classes=3).eval()
assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(model))
images = jax.device_put(np.ones((8, 32, 32, 3), "float32"), NamedSharding(mesh, P("data")))
logits = jax.jit(lambda m, x: m(x))(model, images)
fast = res2net_jax.compile(model)(images)
assert fast.sharding == logits.sharding and np.allclose(fast, logits, rtol=1e-4, atol=1e-5)
print(logits.shape, len(logits.sharding.device_set))
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | flags, timeout=120
    )
    assert done.stdout.strip() == "(8, 3) 8", done.stderr[-2000:]


def test_home_is_expanded(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert res2net_jax.save(model, "~/m") == tmp_path / "m"
    assert same(res2net_jax.load("~/m"), model)
    assert files.cache_home("~/cache") == tmp_path / "cache"


def test_float64_needs_x64(model, tmp_path, x64):
    wide = res2net_jax.create("res2net50_26w_4s", num_classes=5, param_dtype="float64", **SMALL)
    folder = res2net_jax.save(wide, tmp_path / "m")
    program = f"""
import jax, res2net_jax
for x64 in (False, True):
    jax.config.update("jax_enable_x64", x64)
    try:
        print(res2net_jax.load({str(folder)!r}).fc.kernel.dtype)
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    refused, dtype = done.stdout.splitlines()
    assert "jax_enable_x64" in refused and dtype == "float64"


def test_the_transform_goes_with_the_model(tmp_path, photos):
    setting = Preprocessing(size=40, crop_pct=1.0, mean=(0.5,), std=(0.25,))
    grey = initialize(Res2Net(Arch(**SMALL), num_classes=3, in_chans=1, name="mine", preprocessing=setting), 0)
    loaded = res2net_jax.load(res2net_jax.save(grey, tmp_path / "m"))
    assert loaded.preprocessing == setting
    answer = res2net_jax.classify(loaded, photos[0], 1)[0]
    image = res2net_jax.preprocess(setting)(photos[0])
    assert image.shape == (40, 40, 1)
    assert res2net_jax.classify(loaded, image[None], 1)[0][0] == answer


def test_arrays_of_other_shapes_than_the_model_s(model, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_require_described", lambda *_: None)
    model.fc.bias.set_value(jnp.zeros(7))
    folder = res2net_jax.save(model, tmp_path / "m")
    with pytest.raises(ValueError, match=r"fc.bias is \(7,\), expected \(5,\)"):
        res2net_jax.load(folder)


def test_variables_are_in_the_model(model):
    variables(model)["fc.bias"].set_value(jnp.arange(5.0))
    assert np.array_equal(model.fc.bias[...], np.arange(5.0))
