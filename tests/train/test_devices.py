"""Who takes part in a job, and in what order."""

import jax
import pytest

from train import devices


@pytest.mark.parametrize(
    "environment, together",
    [
        ({}, False),
        ({"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "4"}, True),
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


def test_a_given_coordinator_is_used(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments: calls.append(arguments))
    devices.connect("host:1234", 4, 0)
    assert calls == [("host:1234", 4, 0)]


@pytest.mark.parametrize(
    ("environment", "alone"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}, True),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1"}, True),
        ({"SLURM_NTASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, False),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "JAX_LOCAL_DEVICE_IDS": "0"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, False),
    ],
)
def test_the_only_process_of_a_host_takes_all_its_gpus(environment, alone, monkeypatch):
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
