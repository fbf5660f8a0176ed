"""Who takes part in a job, and in what order."""

import io
import os
import re
import subprocess
import sys
import urllib.error

import jax
import pytest

from train import devices

from .conftest import ROOT


@pytest.mark.parametrize(
    "environment, together",
    [
        ({}, False),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"SLURM_NTASKS": "8"}, False),  # in the script of sbatch --ntasks=8, without srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": ""}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, True),
    ],
)
def test_clusters_are_recognised(environment, together, monkeypatch):
    calls = []
    monkeypatch.setattr(devices.os, "environ", environment)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments: calls.append(arguments))
    devices.connect()
    assert calls == ([()] if together else [])


def test_a_cluster_that_does_not_say_where_process_0_is():
    # In a process of its own, where no backend has begun; the variables are those of Open MPI 5.
    code = "from train import devices; devices.connect()"
    environment = {**os.environ, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
    child = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert re.search(r"ValueError: .* where process 0 is JAX cannot tell \(.*\); give --coordinator", child.stderr)


@pytest.mark.parametrize(
    ("environment", "answer", "together"),
    [
        ({}, b"u:u:10.0.0.1,u:u:10.0.0.2", True),
        ({}, b"u:u:10.0.0.1", False),
        ({}, urllib.error.URLError("no such host"), False),  # a TPU that is no machine of Google's cloud
        ({}, TimeoutError(), False),
        ({"JAX_PLATFORMS": "cpu"}, b"u:u:10.0.0.1,u:u:10.0.0.2", False),
        ({"TPU_PROCESS_ADDRESSES": "local"}, b"u:u:10.0.0.1,u:u:10.0.0.2", False),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, b"", True),
    ],
)
def test_the_metadata_server_says_how_many_hosts_a_tpu_has(environment, answer, together, monkeypatch):
    def urlopen(request, timeout):
        assert request.get_header("Metadata-flavor") == "Google"
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)

    calls = []
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(devices.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(devices.os, "environ", environment)
    monkeypatch.setattr(jax.distributed, "initialize", lambda: calls.append(()))
    devices.connect()
    assert calls == ([()] if together else [])


@pytest.mark.parametrize(
    ("backend", "processes", "environment", "off"),
    [
        ("gpu", 2, {}, True),
        ("gpu", 1, {}, False),
        ("tpu", 2, {}, False),
        ("gpu", 2, {"JAX_COMPILATION_CACHE_DIR": "/share/compiled"}, False),
    ],
)
def test_several_processes_with_gpus_compile_without_a_cache(backend, processes, environment, off, monkeypatch):
    seen = {}
    monkeypatch.setattr(devices.os, "environ", environment)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_: None)
    monkeypatch.setattr(jax.config, "update", seen.__setitem__)
    devices.connect("host:1234", 2, 0)
    assert seen == ({"jax_enable_compilation_cache": False} if off else {})


def test_several_processes_that_were_not_connected(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match="there are 4 processes, but jax.distributed knows of none"):
        devices.data_mesh()


def test_a_given_coordinator_is_used(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments: calls.append(arguments))
    devices.connect("host:1234", 4, 0)
    assert calls == [("host:1234", 4, 0)]


@pytest.mark.parametrize(
    ("environment", "alone"),
    [
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}, True),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1"}, True),
        ({"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, False),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "JAX_LOCAL_DEVICE_IDS": "0"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "CUDA_VISIBLE_DEVICES": "5"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, False),
    ],
)
def test_a_process_takes_all_the_gpus_that_are_its_own(environment, alone, monkeypatch):
    seen = {}
    monkeypatch.setattr(devices.os, "environ", environment)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_: seen.update(jax_cuda_visible_devices="0"))
    monkeypatch.setattr(jax.config, "update", seen.__setitem__)
    devices.connect()
    assert seen["jax_cuda_visible_devices"] == ("all" if alone else "0")


@pytest.mark.parametrize("address", ["localhost", "localhost:", "host:port"])
def test_an_address_without_a_port(address):
    with pytest.raises(ValueError, match=f"--coordinator is HOST:PORT, such as .*; got {address}"):
        devices.connect(address, 2, 0)


@pytest.mark.parametrize("given", [("host:1234", None, None), (None, 2, 0), ("host:1234", 2, None)])
def test_half_an_address_is_a_mistake(given):
    with pytest.raises(ValueError, match="give all three or none"):
        devices.connect(*given)


def test_mesh_is_one_axis_of_all_devices():
    mesh = devices.data_mesh()
    assert mesh.axis_names == ("data",) and mesh.size == jax.device_count()
    assert [device.id for device in mesh.devices] == sorted(device.id for device in jax.devices())


def test_what_is_done_together_gives_its_result_or_its_failure():
    assert devices.together(lambda: 3) == 3 and devices.everywhere(True) and not devices.everywhere(False)
    with pytest.raises(ZeroDivisionError):
        devices.together(lambda: 1 / 0)


def test_in_step_passes_batches_and_failures_on():
    def broken():
        yield 1
        raise OSError("unplugged")

    assert list(devices.in_step(iter([1, 2]))) == [1, 2]
    batches = devices.in_step(broken())
    assert next(batches) == 1
    with pytest.raises(OSError, match="unplugged"):
        next(batches)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [("OSError('gone')", 2, "error: gone"), ("MemoryError()", 2, "error: MemoryError"), ("KeyError(1)", 1, "error: 1")],
)
def test_who_leaves_says_why(error, code, told):
    program = f"from train import devices; devices.leave({error})"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    lines = result.stderr.splitlines()
    assert (result.returncode, lines[-1], len(lines) > 1) == (code, told, code == 1)
