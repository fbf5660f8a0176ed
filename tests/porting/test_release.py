import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import porting
import res2net_jax
from porting import __main__ as command_line
from porting import parity
from porting.parity import SIZES, STAGES, certify
from res2net_jax.metadata import read_metadata

NAME = "res2net50_48w_2s"


def test_port_certifies_and_records_where_from(safetensors_file, weights, tmp_path):
    folder = porting.port(NAME, safetensors_file, tmp_path / "m")
    metadata = read_metadata(folder)
    certificate, source = metadata["certificate"], metadata["source"]
    assert source["origin"] == str(safetensors_file) and source["bytes"] == safetensors_file.stat().st_size
    assert len(source["sha256"]) == 64
    assert certificate["certified"] is True
    for dtype, limit in (("float64", 1e-12), ("float32", 1e-5)):
        assert list(certificate["error"][dtype]) == [f"{h}x{w}" for h, w in SIZES]
        for stages in certificate["error"][dtype].values():
            assert tuple(stages) == STAGES
            assert all(0 <= error < limit for error in stages.values())
    assert {"torch", "timm", "jax", "flax", "numpy", "python"} <= certificate["versions"].keys()
    assert np.array_equal(porting.state_dict(res2net_jax.load(folder))["fc.weight"], weights["fc.weight"])


def test_a_model_that_computes_something_else_is_not_written(safetensors_file, tmp_path, monkeypatch):
    import jax

    from res2net_jax.layers import BatchNorm

    monkeypatch.setattr(BatchNorm, "eps", 1e-3)
    jax.clear_caches()
    with pytest.raises(ValueError, match="does not agree with timm in float64 and float32; nothing was written"):
        porting.port(NAME, safetensors_file, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    jax.clear_caches()


def test_without_timm_the_checkpoint_says_so(safetensors_file, weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    certificate = certify(NAME, weights)
    assert certificate["certified"] is False
    assert "timm" in certificate["reason"] and "pip install 'res2net_jax[port]'" in certificate["reason"]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_files_of_other_types_are_certified_as_they_are_stored(weights, tmp_path, dtype):
    from safetensors.torch import save_file

    tensors = {key: torch.from_numpy(np.array(value)).to(getattr(torch, dtype)) for key, value in weights.items()}
    save_file({key: value for key, value in tensors.items() if "tracked" not in key}, tmp_path / "m.safetensors")
    folder = porting.port(NAME, tmp_path / "m.safetensors", tmp_path / "m")
    assert read_metadata(folder)["certificate"]["certified"]


def test_other_classes_and_channels(timm_model, tmp_path):
    reference = timm_model(NAME, num_classes=5, in_chans=1)
    save_file({key: value.numpy() for key, value in reference.state_dict().items()}, tmp_path / "m.safetensors")
    model = res2net_jax.load(porting.port(NAME, tmp_path / "m.safetensors", tmp_path / "m"))
    assert (model.num_classes, model.in_chans) == (5, 1)


def test_without_a_classifier(timm_model, tmp_path):
    reference = timm_model(NAME, num_classes=0)
    save_file({key: value.numpy() for key, value in reference.state_dict().items()}, tmp_path / "m.safetensors")
    folder = porting.port(NAME, tmp_path / "m.safetensors", tmp_path / "m")
    assert read_metadata(folder)["certificate"]["certified"]
    assert res2net_jax.load(folder).num_classes == 0


def test_another_architecture_is_certified_too(tmp_path):
    import timm
    from timm.layers import BlurPool2d, get_attn

    arch = {"stem_type": "deep", "stem_width": 32, "num_classes": 5, "global_pool": "catavgmax"}
    classes = {"aa_layer": BlurPool2d, "block_args": {"scale": 2, "attn_layer": get_attn("se")}}
    torch.manual_seed(0)
    reference = timm.create_model(NAME, zero_init_last=False, **arch, **classes)
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    save_file({key: value.numpy() for key, value in reference.state_dict().items()}, tmp_path / "m.safetensors")
    options = {"attn_layer": "se", "stem_type": "deep", "stem_width": 32, "aa_layer": "blur"}
    folder = porting.port(NAME, tmp_path / "m.safetensors", tmp_path / "m", **options)  # the classifier shows the pool
    assert read_metadata(folder)["certificate"]["certified"]
    found = res2net_jax.load(folder)
    assert found.arch.global_pool == "catavgmax" and found.num_classes == 5
    with pytest.raises(ValueError, match="act_layer is in no array, so give it to load; or name an output"):
        porting.port(NAME, tmp_path / "m.safetensors", **options, act_layer="silu")
    with pytest.raises(ValueError, match=r"(?s)unexpected:.*A model made with options needs them here too"):
        porting.port(NAME, tmp_path / "m.safetensors", tmp_path / "other")


def test_without_a_pool_the_last_maps_are_compared(timm_model):
    weights = {key: value.numpy() for key, value in timm_model(NAME, num_classes=0).state_dict().items()}
    weights = {key: value for key, value in weights.items() if "num_batches_tracked" not in key}
    assert certify(NAME, weights, global_pool="")["certified"]


def test_a_classifier_of_zeros_is_certified_and_weights_that_overflow_are_not(weights):
    zeros = {key: np.zeros_like(value) for key, value in weights.items() if key.startswith("fc.")}
    certificate = certify(NAME, weights | zeros)
    assert certificate["certified"] and certificate["error"]["float64"]["224x224"]["logits"] == 0
    huge = {"bn1.weight": np.full_like(weights["bn1.weight"], 1e38)}
    with pytest.raises(ValueError, match="timm's res2net.* itself gives infinity or NaN"):
        certify(NAME, weights | huge)


def test_a_model_that_gives_nan_is_not_certified(monkeypatch):
    small = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}
    weights = porting.state_dict(res2net_jax.create(NAME, **small))
    monkeypatch.setattr(parity, "_stages", lambda model, images: [np.nan] * len(STAGES))
    with pytest.raises(ValueError, match="does not agree with timm in float64 and float32"):
        certify(NAME, weights, **small)


def test_timm_has_no_model_of_two_stages(tmp_path):
    shape = {"layers": (1, 1), "channels": (16, 32)}
    file = res2net_jax.export(res2net_jax.create(NAME, **shape).eval(), tmp_path / "mine.safetensors")
    folder = porting.port(NAME, file, tmp_path / "m", **shape)
    certificate = read_metadata(folder)["certificate"]
    assert certificate == {"certified": False, "reason": "timm's models have four stages"}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timm_loads_the_exported_file_strictly(checkpoint_folder, weights, timm_model, tmp_path, suffix):
    import timm

    model = res2net_jax.load(checkpoint_folder)
    file = res2net_jax.export(model, tmp_path / f"out{suffix}")
    content = torch.load(file, weights_only=True) if suffix == ".pth" else load_file(file)
    tensors = {key: torch.as_tensor(value) for key, value in content.items()}
    fresh = timm.create_model(NAME)
    fresh.load_state_dict(tensors, strict=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(fresh.eval()(x), timm_model(NAME)(x))
    again = timm.create_model(NAME, checkpoint_path=str(file)).eval()
    with torch.inference_mode():
        assert torch.equal(again(x), timm_model(NAME)(x))
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert res2net_jax.export(model, tmp_path / "new" / file.name).is_file()
    with pytest.raises(PermissionError, match="cannot write"):
        res2net_jax.export(model, file / file.name)
    with pytest.raises(FileExistsError, match="--force"):
        res2net_jax.export(model, file)


def test_what_cannot_be_ported(safetensors_file, weights, tmp_path):
    with pytest.raises(ValueError, match="did you mean"):
        porting.port("res2net50_26w4s", safetensors_file)
    with pytest.raises(ValueError, match=f"They fit: {NAME}"):
        porting.port("res2net50_26w_4s", safetensors_file, tmp_path / "m")
    broken = copy.copy(weights) | {"bn1.running_mean": np.full(64, np.nan, "float32")}
    save_file(broken, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="1 NaN or infinite:\n  bn1.running_mean"):
        porting.port(NAME, tmp_path / "nan.safetensors", tmp_path / "m")
    assert not (tmp_path / "m").exists()
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.tex").touch()
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="not a checkpoint, so it is left alone"):
            porting.port(NAME, safetensors_file, tmp_path / "m", verify=False, overwrite=overwrite)


def run(*arguments, env=None):
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=300, env=env)


def test_command_line(safetensors_file, tmp_path, photos):
    done = run("porting", NAME, "--source", str(safetensors_file), "--output", str(tmp_path / "m"))
    assert done.returncode == 0, done.stderr
    header, row = done.stdout.splitlines()
    assert header.split() == ["model", "float64", "error", "float32", "error", "certified", "folder"]
    assert row.split()[0] == NAME and row.split()[3:] == ["yes", str(tmp_path / "m")]

    info = run("res2net_jax", "info", str(tmp_path / "m"), "--size", "224x285")
    assert "5,375,291,520 at 224x285 (the model index's convention)" in info.stdout
    assert "certified       against timm" in info.stdout and "float64 224x224" in info.stdout

    predicted = run("res2net_jax", "predict", str(tmp_path / "m"), *map(str, photos), "--top-k", "2")
    assert predicted.returncode == 0, predicted.stderr
    assert [line.strip() for line in predicted.stdout.splitlines()[::3]] == [str(file) for file in photos]

    exported = run("porting", "export", str(tmp_path / "m"), str(tmp_path / "out.safetensors"))
    assert exported.stdout.strip() == str(tmp_path / "out.safetensors")


def test_several_models_of_which_one_fails(tmp_path, monkeypatch, capsys):
    """Each has a folder of its own, and the failure stops no other."""

    def port(name, source, output, verify, *, overwrite, **options):
        if name == "res2net50d":
            raise ConnectionError("no network")
        return res2net_jax.save(res2net_jax.create(name, layers=(1,), channels=(8,)), output, overwrite=overwrite)

    monkeypatch.setattr(command_line, "port", port)
    names = ("res2net50_14w_8s", "res2net50d", "res2net50_48w_2s")
    with pytest.raises(ValueError, match="1 of 3 models were not ported: res2net50d"):
        command_line.command([*names, "--output", str(tmp_path), "--force"])
    printed = capsys.readouterr()
    assert "error: res2net50d: no network" in printed.err.splitlines()
    ported = [row.split() for row in printed.out.splitlines()[1:]]
    assert [(name, folder) for name, *_, folder in ported] == [(name, str(tmp_path / name)) for name in names[::2]]
    assert [res2net_jax.load(tmp_path / name).name for name in names[::2]] == [*names[::2]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("res2net_jax", "info", "res2net50"), "no model is called 'res2net50'; did you mean"),
        (("res2net_jax", "info", "res2net50d", "--size", "0x3"), "--size is HEIGHTxWIDTH"),
        (("res2net_jax", "list", "vgg*"), "no model matches 'vgg*'"),
        (("res2net_jax", "predict", "res2net50d", "nothing.jpg"), "there is no file or folder nothing.jpg"),
        (("res2net_jax", "predict", "./nothing", __file__), "there is no folder"),
        (("porting",), "give the names of models, or --all"),
        (("porting", "export", "nowhere", "out.bin"), "must end in .pth or .safetensors"),
        (("porting", "export", "nowhere", "out.pth"), "there is no folder"),
        (("porting", "res2net50d", "--source", "none.pth"), "there is no file none.pth"),
    ],
)
def test_mistakes_get_one_line(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and message in done.stderr and "Traceback" not in done.stderr
