import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import textwrap

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import porting
import res2net_jax
from res2net_jax import hub
from res2net_jax.metadata import read_metadata

NAME = "res2net50_48w_2s"


def start(code, home, **env):
    env = os.environ | {"RES2NET_JAX_HOME": str(home)} | env
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out


@pytest.fixture
def load_and_sum(safetensors_file):
    """Loads into the cache and prints a sum over all arrays."""
    return f"""
        import jax, numpy, res2net_jax
        model = res2net_jax.load({NAME!r}, source={str(safetensors_file)!r})
        print(sum(float(numpy.abs(leaf).sum()) for leaf in jax.tree.leaves(model)))
    """


def test_a_name_is_ported_once_and_then_cached(safetensors_file, weights, tmp_path, monkeypatch):
    first = res2net_jax.load(NAME, source=safetensors_file, cache_dir=tmp_path)
    assert np.array_equal(porting.state_dict(first)["fc.weight"], weights["fc.weight"])
    assert first.bn1.use_running_average
    folder = tmp_path / "models" / hub.cache_key(NAME, safetensors_file)
    assert folder.is_dir()

    def fail(*args, **kwargs):
        raise AssertionError("ported again")

    monkeypatch.setattr(porting, "port", fail)
    again = res2net_jax.load(NAME, source=safetensors_file, cache_dir=tmp_path)
    assert np.array_equal(again.fc.kernel[...], first.fc.kernel[...])
    monkeypatch.setenv("RES2NET_JAX_HOME", str(tmp_path))
    assert hub.cached(NAME, source=safetensors_file) == hub.cached(f"{NAME}.in1k", source=safetensors_file) == folder


def test_a_name_is_the_release_whatever_is_called_so(safetensors_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    res2net_jax.save(res2net_jax.create("res2net50d", layers=(1,), channels=(8,)), NAME)
    monkeypatch.setenv("RES2NET_JAX_HOME", str(tmp_path / "home"))
    porting.port(NAME, safetensors_file, hub.cache_folder(NAME), verify=False)
    assert (res2net_jax.load(NAME).name, res2net_jax.load(f"./{NAME}").name) == (NAME, "res2net50d")


def test_an_explicit_source_does_not_take_the_release_s_place(safetensors_file, tmp_path):
    other = tmp_path / "other.safetensors"
    other.write_bytes(safetensors_file.read_bytes())
    keys = {hub.cache_key(NAME), hub.cache_key(NAME, safetensors_file), hub.cache_key(NAME, "timm/x")}
    assert len(keys) == 3
    assert hub.cache_key(NAME, other) == hub.cache_key(NAME, safetensors_file)  # by content, not by path


def test_a_file_of_another_architecture(timm_model, tmp_path):
    theirs = timm_model(NAME, num_classes=5, global_pool="catavgmax", down_kernel_size=3)
    file = tmp_path / "mine.safetensors"
    save_file({key: value.numpy() for key, value in theirs.state_dict().items()}, file)
    options = {"source": file, "cache_dir": tmp_path, "down_kernel_size": 3}
    x = np.random.default_rng(0).standard_normal((1, 64, 64, 3)).astype(np.float32)
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    for asked in ({}, {"global_pool": "catavgmax"}, {"global_pool": "catavgmax", "num_classes": 5}):
        model = res2net_jax.load(NAME, **options, **asked)
        np.testing.assert_allclose(model(x), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert res2net_jax.load(NAME, **options, global_pool="max", num_classes=0).fc is None
    assert res2net_jax.load(NAME, **options, output_stride=8, drop_rate=0.1).arch.output_stride == 8
    assert len(list((tmp_path / "models").glob("res2net*"))) == 1, "ported once"
    with pytest.raises(ValueError, match="wrong shape"):
        res2net_jax.load(NAME, source=file, cache_dir=tmp_path)


def test_what_is_asked_for_twice_or_is_nothing(checkpoint_folder, safetensors_file, tmp_path):
    with pytest.raises(ValueError, match="source= goes with a model name"):
        res2net_jax.load(checkpoint_folder, source=safetensors_file)
    with pytest.raises(ValueError, match="expected a model name or a checkpoint folder; got 3"):
        res2net_jax.load(3)
    with pytest.raises(ValueError, match="expected a model name or a checkpoint folder; got ''"):
        res2net_jax.load("")
    for file in (safetensors_file, str(safetensors_file)):
        with pytest.raises(ValueError, match=r"is a file; .*: load\(NAME, source=\".*model.safetensors\"\)"):
            res2net_jax.load(file)
    with pytest.raises(ValueError, match="no option 'num_clases'; did you mean num_classes?"):
        res2net_jax.load(NAME, num_clases=3)
    with pytest.raises(ValueError, match="no option 'pretrained'; load gives trained weights"):
        res2net_jax.load(NAME, pretrained=True)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        res2net_jax.load("./res2net50_26w_4s")
    with pytest.raises(FileNotFoundError, match=r"load\(NAME, source=ADDRESS\)"):
        res2net_jax.load("https://example.org/m.safetensors")
    for address in ("hf-hub:timm/x.in1k", "hf_hub:timm/x.in1k", "timm/x.in1k"):
        with pytest.raises(FileNotFoundError, match=r'load\(NAME, source="timm/x.in1k"\)'):
            res2net_jax.load(address)
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(PermissionError, match="RES2NET_JAX_HOME"):
        res2net_jax.load(NAME, source=safetensors_file, cache_dir=blocked)


def test_a_read_only_cache_serves_what_it_has(safetensors_file):
    with tempfile.TemporaryDirectory() as home:  # pytest's own folders are closed to other users
        code = f"""
            import os, pathlib, shutil, res2net_jax
            home = pathlib.Path({home!r})
            os.chdir(home)
            shutil.copyfile({str(safetensors_file)!r}, "weights.safetensors")
            def load(name):
                return res2net_jax.load(name, source="weights.safetensors", cache_dir=home)
            load({NAME!r})
            for folder in (home, home / "models"):
                folder.chmod(0o555)
            if os.geteuid() == 0:  # root may write everywhere
                os.seteuid(65534)
            print(load({NAME!r}).num_classes)
            try:
                load("res2net50_26w_4s")
            except PermissionError as error:
                print(error)
            """
        out = finish(start(code, home))
        os.chmod(home, 0o755)
        os.chmod(f"{home}/models", 0o755)
    assert out.startswith("1000\n") and "cannot write" in out and "RES2NET_JAX_HOME" in out


def test_the_release_comes_from_the_hub_else_from_its_url(safetensors_file, tmp_path, monkeypatch):
    """No network here: both addresses are tried, and the message says what to do."""
    asked = []

    def refuse(source, **options):
        asked.append(source)
        raise ConnectionError(f"no way to {source}")

    monkeypatch.setattr("porting.release.fetch", refuse)
    with pytest.raises(ConnectionError) as caught:
        res2net_jax.load(NAME, cache_dir=tmp_path)
    variant = res2net_jax.get_variant(NAME)
    assert asked == [variant.hub_id, variant.url]
    assert "could not be downloaded" in str(caught.value) and "give the file as source=" in str(caught.value)
    assert not (tmp_path / "models" / NAME).exists()


def test_four_processes_at_once(load_and_sum, tmp_path):
    sums = [finish(process) for process in [start(load_and_sum, tmp_path) for _ in range(4)]]
    assert len(set(sums)) == 1 and float(sums[0]) > 0
    assert len([path for path in (tmp_path / "models").iterdir() if not path.name.startswith(".")]) == 1
    assert not list((tmp_path / "models").glob(".*tmp-*"))


KILLER = """
import os, signal, sys
steps, last = 0, int(os.environ["KILL_AT"])
def step(event, arguments):
    global steps
    changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "open")
    if changes and os.environ["RES2NET_JAX_HOME"] in str(arguments[0]):
        steps += 1
        if steps == last:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(step)
"""


class Kills:
    """Loads a release by URL, killed at any one of the steps that it takes in its cache's file system."""

    def __init__(self, server, content, tmp_path):
        digest = hashlib.sha256(content).hexdigest()
        server.files[f"/model-{digest[:8]}.safetensors"] = content
        self.code = f"""
import jax, numpy, res2net_jax
model = res2net_jax.load({NAME!r}, source="{server.url}/model-{digest[:8]}.safetensors")
print(sum(float(numpy.abs(leaf).sum()) for leaf in jax.tree.leaves(model)))
"""
        self.tmp_path = tmp_path
        calm = start(KILLER + self.code + "print(steps)", tmp_path / "calm", KILL_AT="0")
        self.expected, self.steps = finish(calm).split()
        self.steps = int(self.steps)
        assert self.steps > 20

    def kill(self, at):
        home = self.tmp_path / str(at)
        process = start(KILLER + self.code, home, KILL_AT=str(at))
        process.communicate(timeout=300)
        assert process.returncode in (-signal.SIGKILL, 0)  # how many steps there are varies a little
        assert finish(start(self.code, home)).strip() == self.expected, f"killed at step {at} of {self.steps}"
        assert not list((home / "models").glob(".*tmp-*"))
        assert not list((home / "downloads").rglob("*.part"))


def test_a_kill_at_any_step_leaves_a_cache_that_works(server, safetensors_file, tmp_path):
    kills = Kills(server, safetensors_file.read_bytes(), tmp_path)
    for share in (0.05, 0.4, 0.7, 0.95):
        kills.kill(int(share * kills.steps))


@pytest.mark.soak
def test_twenty_kills(server, safetensors_file, tmp_path):
    kills = Kills(server, safetensors_file.read_bytes(), tmp_path)
    for at in np.linspace(1, kills.steps, 20, dtype=int):
        kills.kill(at)


def test_what_a_killed_overwrite_moved_away_is_found(safetensors_file, tmp_path, monkeypatch):
    folder = hub.cached(NAME, source=safetensors_file, cache_dir=tmp_path)
    (folder.parent / f".{folder.name}.tmp-dead").mkdir()
    folder.rename(folder.parent / f".{folder.name}.tmp-dead" / "old")
    monkeypatch.setattr(porting, "port", None)
    assert res2net_jax.load(NAME, source=safetensors_file, cache_dir=tmp_path).num_classes == 1000


def test_a_damaged_cache_entry_is_ported_again(safetensors_file, tmp_path):
    folder = hub.cached(NAME, source=safetensors_file, cache_dir=tmp_path)
    (folder / "_CHECKPOINT_METADATA").unlink()
    assert res2net_jax.load(NAME, source=safetensors_file, cache_dir=tmp_path).num_classes == 1000


def test_a_name_comes_from_the_hub(server, safetensors_file, load_and_sum, tmp_path):
    server.add_to_hub(res2net_jax.get_variant(NAME).hub_id, safetensors_file.read_bytes())
    hub_only = load_and_sum.replace(f", source={str(safetensors_file)!r}", "")
    env = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    assert finish(start(hub_only, tmp_path / "a", **env)) == finish(start(load_and_sum, tmp_path / "b"))
    source = read_metadata(hub.cache_folder(NAME, cache_dir=tmp_path / "a"))["source"]
    assert source["origin"] == f"hf://timm/{NAME}.in1k@0123456789abcdef0123456789abcdef01234567"
    assert (tmp_path / "a" / "models" / NAME).is_dir()


def test_a_module_of_the_users_that_hides_porting(tmp_path, monkeypatch):
    (tmp_path / "porting.py").write_text("mine = 1")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "porting"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="porting.py hides the package porting of res2net_jax; rename it"):
        res2net_jax.load(NAME, source=__file__, cache_dir=tmp_path)
    model = res2net_jax.create(NAME, layers=(1,), channels=(8,)).eval()
    with pytest.raises(ImportError, match="hides the package porting"):
        res2net_jax.export(model, tmp_path / "model.pth")
    assert not (tmp_path / "model.pth").exists()


def test_without_torch(safetensors_file, checkpoint_folder, photos, tmp_path):
    """From safetensors and from Orbax to the classes of a photograph, where torch and TensorFlow cannot be imported."""
    code = f"""
        import sys
        for name in ("torch", "timm", "torchvision", "tensorflow", "tensorflow_datasets"):
            sys.modules[name] = None
        import res2net_jax
        ported = res2net_jax.load({NAME!r}, source={str(safetensors_file)!r})
        restored = res2net_jax.load({str(checkpoint_folder)!r})
        for model in ported, restored:
            print(res2net_jax.classify(model, {str(photos[0])!r}, 1)[0].index)
        """
    first, second = finish(start(code, tmp_path)).split()
    assert first == second


def test_importing_the_library_imports_little(tmp_path):
    code = """
        import sys, res2net_jax
        heavy = {"torch", "tensorflow", "tensorflow_datasets", "orbax", "huggingface_hub", "matplotlib", "porting"}
        print(sorted(heavy & sys.modules.keys()))
        """
    assert finish(start(code, tmp_path)).strip() == "[]"
