import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import time

import numpy as np
import pytest

import porting
import res2net_jax
from res2net_jax import hub

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
    assert hub.cached(NAME, source=safetensors_file) == folder


def test_an_explicit_source_does_not_take_the_release_s_place(safetensors_file, tmp_path):
    other = tmp_path / "other.safetensors"
    other.write_bytes(safetensors_file.read_bytes())
    keys = {hub.cache_key(NAME), hub.cache_key(NAME, safetensors_file), hub.cache_key(NAME, "timm/x")}
    assert len(keys) == 3
    assert hub.cache_key(NAME, other) == hub.cache_key(NAME, safetensors_file)  # by content, not by path


def test_what_is_asked_for_twice_or_is_nothing(checkpoint_folder, safetensors_file, tmp_path):
    with pytest.raises(ValueError, match="source= goes with a model name"):
        res2net_jax.load(checkpoint_folder, source=safetensors_file)
    with pytest.raises(ValueError, match="expected a model name or a checkpoint folder; got 3"):
        res2net_jax.load(3)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        res2net_jax.load("./res2net50_26w_4s")
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


def kill_at_random(code, home, expected, seed, longest=4.0):
    process = start(code, home)
    time.sleep(random.Random(seed).uniform(0.5, longest))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert finish(start(code, home)) == expected
    assert not list((home / "models").glob(".*tmp-*"))


@pytest.mark.parametrize("seed", range(3))
def test_a_kill_leaves_a_cache_that_works(load_and_sum, safetensors_file, weights, tmp_path, seed):
    expected = finish(start(load_and_sum, tmp_path / "calm"))
    kill_at_random(load_and_sum, tmp_path / "killed", expected, seed)


@pytest.mark.soak
def test_twenty_kills(load_and_sum, tmp_path):
    expected = finish(start(load_and_sum, tmp_path / "calm"))
    for seed in range(20):
        kill_at_random(load_and_sum, tmp_path / str(seed), expected, seed)


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
