"""The devices of a job: joining its processes, and the mesh over all of them."""

import os
import re
import reprlib
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

T = TypeVar("T")


def connect(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins this process with the others of its job. Call it before anything touches a device.

    Args:
        coordinator: ``HOST:PORT`` of process 0. Without it the cluster is asked: TPU pods, Slurm and Open MPI
            say who takes part; where they say nothing, this process is alone.
        num_processes: With ``coordinator``, how many processes take part.
        process_id: With ``coordinator``, which of them this is.

    Raises:
        ValueError: Some of the three are given and some are not, or the address is none.
    """
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    if any(given) and not all(given):
        raise ValueError("--coordinator, --num-processes and --process-id go together; give all three or none")
    if all(given):
        if not re.fullmatch(r".+:\d+", coordinator):
            raise ValueError(f"--coordinator is HOST:PORT, such as 10.0.0.1:1234; got {coordinator}")
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif _in_a_cluster(os.environ):
        jax.distributed.initialize()
    else:
        return
    if _alone_on_its_host(os.environ):  # JAX would then take one GPU, the one of this task's number on the host
        for platform in ("cuda", "rocm"):
            jax.config.update(f"jax_{platform}_visible_devices", "all")


def data_mesh() -> Mesh:
    """All devices along one axis, ``data``, in the order of their processes."""
    # jax.make_mesh may reorder them; here process p must hold the p-th share of a batch.
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def everywhere(ok: bool) -> bool:
    """Whether it is so in every process; all of them ask together."""
    return ok if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(ok)).all())


def largest(number: int) -> int:
    """The largest ``number`` of all processes; all of them ask together."""
    return number if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.array(number)).max())


def together(action: Callable[[], T]) -> T:
    """The result of ``action()``, which every process calls. If it fails in one process, all of them stop.

    Otherwise the others would wait for it in their next step, for minutes, until the runtime aborts them all.

    Raises:
        Exception: The failure of this process, or ValueError that another one failed.
    """
    result, failure = None, None
    try:
        result = action()
    except Exception as error:
        failure = error
    if not everywhere(failure is None):
        raise failure or ValueError("another process has failed and says why; this one has stopped with it")
    return result


def require_agreement(facts: dict[str, object]) -> None:
    """ValueError, in every process, unless each fact is the same in all of them; it names those that are not.

    Otherwise each would train a model of its own, or wait for the others for ever.
    """
    mine = np.array([zlib.crc32(repr(fact).encode()) for fact in facts.values()], np.uint32)
    others = multihost_utils.process_allgather(mine).reshape(-1, len(facts))
    differing = [
        f"{name}: here {reprlib.repr(fact)}" for (name, fact), hashes in zip(facts.items(), others.T) if np.ptp(hashes)
    ]
    if differing:
        raise ValueError(
            "the processes of this run do not agree; give all of them the same command and the same data:\n  "
            + "\n  ".join(differing)
        )


def leave(error: Exception) -> NoReturn:
    """Ends this process at once with code 2: it has failed alone, in the middle of what all of them do together.

    The others notice that it is gone. An orderly end would wait for them, and they for this process.
    """
    print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(2)


def in_step(batches: Iterator[dict]) -> Iterator[dict]:
    """``batches``, which must be as many in each process. If one fails to get its next, all stop (:func:`together`)."""
    while (batch := together(lambda: next(batches, None))) is not None:
        yield batch


def _alone_on_its_host(environment):
    """Whether Slurm or Open MPI started one process a host. Of Slurm's "2(x3),1" the own host's number is not known."""
    on_host = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") or ""
    return re.fullmatch(r"1(\(x\d+\))?", on_host) is not None and "JAX_LOCAL_DEVICE_IDS" not in environment


def _in_a_cluster(environment):
    """Whether more than one process takes part, by the variables that jax.distributed reads as well."""
    tasks = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return len(hosts) > 1 or any(int(environment.get(name) or 1) > 1 for name in tasks)
