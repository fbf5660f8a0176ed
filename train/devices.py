"""The devices of a job: joining its processes, and the mesh over all of them."""

import os
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh


def connect(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins this process with the others of its job. Call it before anything touches a device.

    Args:
        coordinator: ``HOST:PORT`` of process 0. Without it the cluster is asked: TPU pods, Slurm and Open MPI
            say who takes part; where they say nothing, this process is alone.
        num_processes: With ``coordinator``, how many processes take part.
        process_id: With ``coordinator``, which of them this is.

    Raises:
        ValueError: Some of the three are given and some are not.
    """
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    if any(given) and not all(given):
        raise ValueError("--coordinator, --num-processes and --process-id go together; give all three or none")
    if all(given):
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif _in_a_cluster(os.environ):
        jax.distributed.initialize()


def data_mesh() -> Mesh:
    """All devices along one axis, ``data``, in the order of their processes."""
    # jax.make_mesh may reorder them; here process p must hold the p-th share of a batch.
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def in_step(batches: Iterator[dict]) -> Iterator[dict]:
    """``batches``, which must be as many in each process. If one process fails to get its next, all of them stop.

    Otherwise the others would wait for it in their next step, for minutes, until the runtime aborts them all.

    Raises:
        Exception: The failure of this process, or ValueError that another one failed.
    """
    while True:
        batch, failure = None, None
        try:
            batch = next(batches, None)
        except Exception as error:
            failure = error
        together = jax.process_count() > 1
        if together and multihost_utils.process_allgather(np.array(failure is not None)).any() or failure:
            raise failure or ValueError("another process has failed and says why; this one has stopped with it")
        if batch is None:
            return
        yield batch


def _in_a_cluster(environment):
    """Whether more than one process takes part, by the variables that jax.distributed reads as well."""
    tasks = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return len(hosts) > 1 or any(int(environment.get(name) or 1) > 1 for name in tasks)
