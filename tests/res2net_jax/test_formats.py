"""Files for other programs, run by those programs."""

import dataclasses
import functools
import resource
import subprocess
import sys
import textwrap

import jax
import numpy as np
import onnxruntime
import pytest
import timm
import torch

import porting
import porting.onnx
import res2net_jax
from res2net_jax import files, formats, stablehlo
from res2net_jax.init import variables
from res2net_jax.variants import Preprocessing

SMALL = {"layers": (1, 1), "channels": (8, 16), "num_classes": 10, "zero_init_last": False}
FOUR_STAGES = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}  # timm knows no fewer
SIZE = (48, 64)


def small_model(**options):
    model = res2net_jax.create("res2net50_26w_4s", **(SMALL | options)).eval()
    rng = np.random.default_rng(0)
    for path, leaf in variables(model).items():  # a fresh norm is the identity, and could be forgotten
        if path.endswith((".scale", ".var")):
            leaf.set_value(jax.numpy.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype))
        elif path.endswith((".bias", ".mean")):
            leaf.set_value(jax.numpy.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype))
    return model


@pytest.fixture(scope="module")
def model():
    return small_model()


@functools.cache
def pixels(channels=3):
    return np.random.default_rng(1).integers(0, 256, (64, *SIZE, channels), np.uint8)


def normalised():
    setting = res2net_jax.get_variant("res2net50_26w_4s").preprocessing
    return ((pixels() / 255 - np.array(setting.mean)) / np.array(setting.std)).astype("float32")


def difference(a, b):
    return np.abs(np.asarray(a) - b).max() / np.abs(b).max()


@pytest.fixture(scope="module")
def logits(model):
    return np.asarray(jax.jit(lambda model, images: model(images))(model, normalised()))


def test_stablehlo_runs_where_this_library_cannot_be_imported(model, logits, tmp_path):
    res2net_jax.export(model, tmp_path / "inside.stablehlo", size=SIZE)
    res2net_jax.export(model, tmp_path / "beside.stablehlo", size=SIZE, uint8=True, weights_beside=True)
    res2net_jax.export(model, tmp_path / "bfloat16.stablehlo", size=SIZE, dtype="bfloat16")
    assert {file.name for file in tmp_path.iterdir()} == {
        *("inside.stablehlo", "beside.stablehlo", "beside.weights.safetensors", "bfloat16.stablehlo")
    }
    np.savez(tmp_path / "given.npz", pixels=pixels(), images=normalised())
    code = """
        import sys
        for name in ("res2net_jax", "porting", "flax", "orbax"):
            sys.modules[name] = None
        import jax, numpy as np, safetensors.flax
        given = np.load("given.npz")
        weights = safetensors.flax.load_file("beside.weights.safetensors")
        arguments = {"inside": ("images",), "beside": ("pixels",), "bfloat16": ("images",)}
        answers = {}
        for name, images in (("inside", "images"), ("beside", "pixels"), ("bfloat16", "images")):
            exported = jax.export.deserialize(open(f"{name}.stablehlo", "rb").read())
            assert exported.platforms == ("cpu", "cuda", "tpu"), exported.platforms
            run = jax.jit(exported.call)
            first = (weights,) if name == "beside" else ()
            for batch in (1, 3, 64):
                answers[f"{name} {batch}"] = run(*first, given[images][:batch])
        np.savez("answers.npz", **answers)
    """
    arguments = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = np.load(tmp_path / "answers.npz")
    assert len(answers.files) == 9
    for name, answer in answers.items():
        kind, batch = name.split()
        assert answer.shape == (int(batch), 10) and answer.dtype == np.float32
        assert difference(answer, logits[: int(batch)]) < {"bfloat16": 0.02}.get(kind, 1e-6), name
    size = {name: (tmp_path / f"{name}.stablehlo").stat().st_size for name in ("inside", "beside", "bfloat16")}
    assert size["beside"] < size["bfloat16"] < size["inside"]
    assert str(files.__file__).rpartition("/")[0].encode() not in (tmp_path / "inside.stablehlo").read_bytes()

    run = stablehlo.load(tmp_path / "beside.stablehlo")
    assert difference(run(pixels()[:3]), logits[:3]) < 1e-6
    assert difference(jax.jit(lambda y: run(pixels()[:3]) + y)(0.0), logits[:3]) < 1e-6
    (tmp_path / "beside.weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="beside.weights.safetensors, which is not there"):
        stablehlo.load(tmp_path / "beside.stablehlo")
    _newer_and_damaged_artefacts(tmp_path / "inside.stablehlo")


def _newer_and_damaged_artefacts(file):
    exported = stablehlo.read(file)
    program = exported.mlir_module_serialized
    newer = dataclasses.replace(exported, calling_convention_version=exported.calling_convention_version + 1)
    unknown = dataclasses.replace(exported, mlir_module_serialized=program.replace(b"add_v1", b"add_v7"))
    for content, message in (
        (newer.serialize(), f"was written by a newer JAX .* JAX {jax.__version__} reads up to"),
        (unknown.serialize(), f"or one of a JAX newer than {jax.__version__}"),
        (file.read_bytes()[:5000], "is damaged, no StableHLO artefact, or"),
        (b"PK\3\4 something else", "is damaged, no StableHLO artefact, or"),
    ):
        other = file.with_name("other.stablehlo")
        other.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            stablehlo.load(other)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        stablehlo.load(file.with_name("none.stablehlo"))


def test_without_flatbuffers_no_artefact_is_called_damaged(tmp_path, monkeypatch):
    def missing(data):
        raise ImportError("Please install 'flatbuffers'")

    (tmp_path / "m.stablehlo").write_bytes(b"sound")
    monkeypatch.setattr(jax.export, "deserialize", missing)
    with pytest.raises(ImportError, match="install 'flatbuffers'"):
        stablehlo.load(tmp_path / "m.stablehlo")


def test_onnx_runtime_agrees(tmp_path):
    options = {"aa_layer": "blurpc", "attn_layer": "se", "stem_type": "deep", "stem_width": 16, "avg_down": True}
    options |= {"cardinality": 2, "scale": 3, "act_layer": "silu", "global_pool": "catavgmax"}
    model = small_model(**FOUR_STAGES, **options)
    run = porting.onnx.load(res2net_jax.export(model, tmp_path / "m.onnx", size=SIZE, uint8=True))
    logits = np.asarray(jax.jit(lambda model, images: model(images))(model, normalised()))
    for batch in (1, 3, 64):
        assert difference(run(pixels()[:batch]), logits[:batch]) < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_onnx_of_two_stages_and_one_channel(tmp_path):
    model = small_model(in_chans=1)
    run = porting.onnx.load(res2net_jax.export(model, tmp_path / "m.onnx", size=32))
    images = np.random.default_rng(0).standard_normal((5, 32, 32, 1)).astype("float32")
    assert difference(run(images), np.asarray(jax.jit(lambda model, images: model(images))(model, images))) < 1e-5


def test_state_dicts_for_timm(tmp_path):
    model = small_model(**FOUR_STAGES)
    for name in ("m.pth", "m.safetensors"):
        arrays = porting.read(res2net_jax.export(model, tmp_path / name))
        expected = porting.state_dict(model)
        assert arrays.keys() == expected.keys()
        assert all(np.array_equal(arrays[key], expected[key]) for key in expected)
        options = FOUR_STAGES | {"num_classes": 10}
        timm.create_model("res2net50_26w_4s", **options, checkpoint_path=str(tmp_path / name))  # strictly


def test_a_pyramid(tmp_path):
    pyramid = small_model(features_only=True, out_indices=(0, 2), **FOUR_STAGES)
    images = normalised()[:5]
    expected = jax.device_get(jax.jit(lambda model, images: model(images))(pyramid, images))
    export = functools.partial(res2net_jax.export, pyramid)
    inside = stablehlo.load(export(tmp_path / "m.stablehlo", size=SIZE, uint8=True))
    beside = stablehlo.load(export(tmp_path / "b.stablehlo", size=SIZE, weights_beside=True))
    onnx = porting.onnx.load(export(tmp_path / "m.onnx", size=SIZE))
    for run, given in ((inside, pixels()[:5]), (beside, images), (onnx, images)):
        maps = run(given)
        assert len(maps) == 2 and all(difference(*pair) < 1e-5 for pair in zip(maps, expected))
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert [output.name for output in session.get_outputs()] == ["act1", "layer2"]

    reference = timm.create_model("res2net50_26w_4s", features_only=True, out_indices=(0, 2), **FOUR_STAGES).eval()
    weights = porting.read(export(tmp_path / "m.safetensors"))
    reference.load_state_dict({key: torch.tensor(value) for key, value in weights.items()}, strict=True)
    with torch.no_grad():
        theirs = reference(torch.tensor(images).permute(0, 3, 1, 2))
    assert all(difference(theirs[i].permute(0, 2, 3, 1), expected[i]) < 1e-5 for i in range(2))


@pytest.mark.parametrize("name", ["m.stablehlo", "m.onnx"])
def test_a_file_that_computes_something_else_is_not_kept(model, tmp_path, monkeypatch, name):
    """By a converter with a defect: it takes other weights."""
    module = stablehlo if name == "m.stablehlo" else porting.onnx
    write = module.write
    other = small_model(rngs=1)
    monkeypatch.setattr(module, "write", lambda model, *given, **options: write(other, *given, **options))
    with pytest.raises(ValueError, match="does not compute what the model does.* it was not kept"):
        res2net_jax.export(model, tmp_path / name, size=32)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_computes_nan_is_not_kept(model, tmp_path, monkeypatch):
    monkeypatch.setattr(stablehlo, "write", lambda model, file, **options: file.touch())
    monkeypatch.setattr(stablehlo, "load", lambda file: lambda images: np.full((len(images), 10), np.nan))
    with pytest.raises(ValueError, match="its outputs are nan of the largest one away .* it was not kept"):
        res2net_jax.export(model, tmp_path / "m.stablehlo", size=32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["m.pth", "m.safetensors", "m.stablehlo"])
def test_a_full_disk_leaves_nothing(model, tmp_path, name):
    (tmp_path / name).write_text("before")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(OSError, match="no space to write .*; nothing was left behind"):
            res2net_jax.export(model, tmp_path / name, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_what_cannot_be_exported(model, tmp_path, monkeypatch):
    export = functools.partial(res2net_jax.export, model)
    for name in ("m", "m.tflite", "m.ONNX"):
        with pytest.raises(ValueError, match="one of .stablehlo .onnx .pth .safetensors"):
            export(tmp_path / name)
    for options in ({"dtype": "bfloat16"}, {"weights_beside": True}):
        with pytest.raises(ValueError, match="options of .stablehlo"):
            export(tmp_path / "m.onnx", **options)
    for options in ({"uint8": True}, {"size": 64}):
        with pytest.raises(ValueError, match="holds weights alone"):
            export(tmp_path / "m.pth", **options)
    with pytest.raises(ValueError, match="one of float32, bfloat16; got float16"):
        export(tmp_path / "m.stablehlo", dtype="float16")
    with pytest.raises(ValueError, match="whole number from 1 up"):
        export(tmp_path / "m.stablehlo", size=0)
    for size in ((32,), (32, 32, 3), 10**9):
        with pytest.raises(ValueError, match=r"size is \(height, width\) in pixels, at most 16,384 each; got"):
            export(tmp_path / "m.stablehlo", size=size)
    with pytest.raises(ValueError, match="mean and standard deviation"):
        res2net_jax.export(small_model(in_chans=4), tmp_path / "m.stablehlo", uint8=True)
    multispectral = small_model(in_chans=4)
    multispectral.preprocessing = Preprocessing(size=40, mean=(0.5,) * 4, std=(0.2,) * 4)
    assert (
        formats._size(multispectral, None) == (40, 40)
        and formats._scaling(multispectral) is multispectral.preprocessing
    )
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        res2net_jax.export(small_model().train(), tmp_path / "m.stablehlo")
    with pytest.raises(ValueError, match="export the one that it was made from"):
        res2net_jax.export(res2net_jax.fuse(model), tmp_path / "m.stablehlo")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install 'res2net_jax\[onnx\]'"):
        export(tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "m.weights.safetensors").write_text("mine")
    with pytest.raises(FileExistsError, match="m.weights.safetensors exists; .*--force"):
        export(tmp_path / "m.stablehlo", weights_beside=True)
    with pytest.raises(FileExistsError, match="is a folder"):
        (tmp_path / "f.pth").mkdir()
        export(tmp_path / "f.pth", overwrite=True)
    with pytest.raises(PermissionError, match="cannot write"):
        export(tmp_path / "m.weights.safetensors" / "m.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"f.pth", "m.weights.safetensors"}
    assert formats.SUFFIXES[0] == stablehlo.SUFFIX


def test_a_model_of_a_single_block_has_no_onnx(tmp_path):
    model = res2net_jax.create("res2net50_26w_4s", layers=(1,), channels=(8,)).eval()
    with pytest.raises(ValueError, match="no model of a single block"):
        res2net_jax.export(model, tmp_path / "model.onnx", size=32)
    assert not any(tmp_path.iterdir())
