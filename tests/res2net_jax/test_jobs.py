"""What the processes of one job (jax.distributed) load and save."""

import os
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import res2net_jax
from res2net_jax import checkpoint

NAME = "res2net50_48w_2s"


def printed_by_two(code, home):
    """What each of the two processes of a job prints that run ``code``, on whose devices ``everywhere`` is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    head = f"""
import os, jax
jax.distributed.initialize("127.0.0.1:{port}", 2, int(os.environ["INDEX"]))
import res2net_jax
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
everywhere = jax.NamedSharding(mesh, jax.P())
"""
    command = [sys.executable, "-c", head + textwrap.dedent(code)]
    env = os.environ | {"RES2NET_JAX_HOME": str(home)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=env | {"INDEX": str(i)}, **pipes) for i in range(2)]
    try:
        answers = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(err[-3000:] for _, err in answers)
    return [out for out, _ in answers]


def test_all_load_and_none_waits_for_another_in_the_port(safetensors_file, tmp_path):
    code = f"""
        model = res2net_jax.load({NAME!r}, source={str(safetensors_file)!r}, sharding=everywhere)
        print(len(model.fc.kernel[...].sharding.device_set), float(abs(model.fc.kernel[...].addressable_data(0)).sum()))
        """
    first, second = printed_by_two(code, tmp_path)
    assert first == second and first.startswith("2 ")


def test_all_save_one_checkpoint_and_leave_other_folders_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").touch()
    model = res2net_jax.create(NAME, layers=(1,), channels=(8,), num_classes=5)
    folder = res2net_jax.save(model, tmp_path / "m")
    code = f"""
        model = res2net_jax.load({str(folder)!r}, sharding=everywhere)
        print(res2net_jax.save(model, {str(tmp_path / "copy")!r}))
        try:
            res2net_jax.save(model, {str(tmp_path / "thesis")!r}, overwrite=True)
        except FileExistsError as error:
            print(error)
        """
    for out in printed_by_two(code, tmp_path):
        copy, error = out.splitlines()[-2:]
        assert copy == str(tmp_path / "copy") and "not a checkpoint, so it is left alone" in error
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter1.tex"]
    copied = checkpoint.arrays(res2net_jax.load(tmp_path / "copy"))
    assert all(np.array_equal(copied[path], value) for path, value in checkpoint.arrays(model).items())


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("nowhere.pth", FileNotFoundError, "there is no file nowhere.pth"),
        (__file__, ValueError, "is neither a PyTorch"),
    ],
)
def test_what_fails_in_one_process_fails_alike(source, error, message, tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(error, match=message):
        res2net_jax.load(NAME, source=source, cache_dir=tmp_path)


def test_the_hash_in_the_name_is_checked_where_a_child_ports(safetensors_file, tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    file = tmp_path / "model-00000000.safetensors"
    file.symlink_to(safetensors_file)
    with pytest.raises(ValueError, match="SHA-256 begins with .*, not 00000000"):
        res2net_jax.load(NAME, source=file, cache_dir=tmp_path)
