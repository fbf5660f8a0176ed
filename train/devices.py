"""The devices of a job: joining its processes, and the mesh over all of them."""

import contextlib
import importlib.util
import os
import re
import reprlib
import sys
import threading
import traceback
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, Sharding

from res2net_jax import command_line
from res2net_jax.files import first_line, out_of_memory

T = TypeVar("T")

PATIENCE = 290  # seconds to wait for the other processes: JAX would wait for 300 and abort


def connect(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins this process with the others of its job. Call it before anything touches a device.

    Args:
        coordinator: ``HOST:PORT`` of process 0. Without it the cluster is asked: TPU pods, Slurm and Open MPI
            say who takes part; where they say nothing, this process is alone.
        num_processes: With ``coordinator``, how many processes take part.
        process_id: With ``coordinator``, which of them this is.

    Raises:
        ValueError: Some of the three are given and some are not, the address is none, or the cluster does not say it.
        ConnectionError: The others cannot be reached, or do not come.
    """
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    if any(given) and not all(given):
        raise ValueError("--coordinator, --num-processes and --process-id go together; give all three or none")
    if all(given):
        if not re.fullmatch(r".+:\d+", coordinator):
            raise ValueError(f"--coordinator is HOST:PORT, such as 10.0.0.1:1234; got {coordinator}")
        _join(coordinator, num_processes, process_id)
    elif _in_a_cluster(os.environ):
        try:
            _join()
        except ValueError as error:  # Open MPI 5, say
            raise ValueError(
                f"this is one of several processes, but where process 0 is JAX cannot tell ({error}); give "
                "--coordinator, --num-processes and --process-id"
            ) from error
    else:
        return
    # JAX would take one GPU, the one of this task's number on the host.
    if _alone_on_its_host(os.environ) or _sees_one_gpu(os.environ):
        for platform in ("cuda", "rocm"):
            jax.config.update(f"jax_{platform}_visible_devices", "all")
    if jax.process_count() > 1 and jax.default_backend() == "gpu" and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # Each process tries out its part of XLA's choices and waits for the others' parts, up to a day. One that finds
        # its program in the cache tries nothing; and JAX writes the cache in process 0 alone.
        jax.config.update("jax_enable_compilation_cache", False)


def data_mesh() -> Mesh:
    """All devices along one axis, ``data``, in the order of their processes.

    Raises:
        ValueError: There are several processes, but they have not been connected, so that nothing could be saved.
    """
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ValueError(
            f"there are {jax.process_count()} processes, but jax.distributed knows of none; give --coordinator, "
            "--num-processes and --process-id"
        )
    # jax.make_mesh may reorder them; here process p must hold the p-th share of a batch.
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def global_arrays(tree: Any, sharding: Sharding) -> Any:
    """``tree`` as arrays over the devices of all processes, each of which gives its own share."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def everywhere(ok: bool) -> bool:
    """Whether it is so in every process; all of them ask together."""
    return ok if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(ok)).all())


def largest(number: int) -> int:
    """The largest ``number`` of all processes; all of them ask together."""
    return number if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.array(number)).max())


def total(number: int) -> int:
    """The sum of the ``number``s of all processes; all of them ask together."""
    return number if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.array(number)).sum())


def of_the_first(numbers: list[int]) -> list[int]:
    """The ``numbers``, below 2**31, of process 0, which may be others and more or fewer than here."""
    if jax.process_count() == 1:
        return numbers
    mine = numbers if jax.process_index() == 0 else []
    padded = np.zeros(largest(len(mine)), np.int32)
    padded[: len(mine)] = mine
    return multihost_utils.broadcast_one_to_all(padded).tolist()


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
        failure = failure or ValueError("another process has failed and says why; this one has stopped with it")
        failure.in_all_processes = True
        raise failure
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


def alone(error: Exception) -> bool:
    """Whether ``error`` is of this one of several processes, while the others go on and wait for it.

    It is not if it, or what it came of, was raised by :func:`together`.
    """
    agreed = any(getattr(link, "in_all_processes", False) for link in (error, error.__cause__))
    return jax.process_count() > 1 and not agreed


def leave(error: Exception) -> NoReturn:
    """Ends this process at once: it has failed alone, in the middle of what all of them do together.

    The others notice that it is gone. An orderly end would wait for them, and they for this process. The exit code is
    2, or 1 for a defect, which shows its traceback.
    """
    explained = isinstance(error, command_line.EXPECTED) or out_of_memory(error)
    if not explained:
        traceback.print_exception(error)
    command_line.say(f"error: {str(error) or type(error).__name__}", sys.stderr)
    os._exit(2 if explained else 1)


@contextlib.contextmanager
def room_to_evaluate(images: int) -> Iterator[None]:
    """Says what to do if the memory does not suffice to evaluate so many images at a time."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise ValueError(
            f"not enough memory to evaluate {images} images at a time ({first_line(error)}); the same command with a "
            "smaller --eval-batch-size continues the run"
        ) from error


def in_step(batches: Iterator[dict]) -> Iterator[dict]:
    """``batches``, which must be as many in each process. If one fails to get its next, all stop (:func:`together`)."""
    while (batch := together(lambda: next(batches, None))) is not None:
        yield batch


def _join(*address):
    """jax.distributed.initialize, in a thread: it waits for minutes, lets no signal through, and aborts in the end."""
    failures = []

    def join():
        try:
            jax.distributed.initialize(*address)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if thread.is_alive():
        failures.append(TimeoutError(f"not all were there after {PATIENCE} seconds"))
    for error in failures:
        if not isinstance(error, (TimeoutError, jax.errors.JaxRuntimeError)):
            raise error
        where = f" at {address[0]}" if address else ""
        raise ConnectionError(
            f"could not join the other processes{where} ({first_line(error)}); start all of them at the same time, "
            "and give each the address of process 0, whose port the others must be able to reach"
        ) from error


def _alone_on_its_host(environment):
    """Whether Slurm or Open MPI started one process per host. Of Slurm's "2(x3),1" this host's is not known."""
    on_host = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") or ""
    return re.fullmatch(r"1(\(x\d+\))?", on_host) is not None and "JAX_LOCAL_DEVICE_IDS" not in environment


def _sees_one_gpu(environment):
    """Whether the launcher has given this process a GPU of its own (``srun --gpus-per-task=1``)."""
    seen = [environment.get(name) for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")]
    return any(gpus and "," not in gpus for gpus in seen) and "JAX_LOCAL_DEVICE_IDS" not in environment


def _tpu_hosts(environment):
    """How many hosts the TPU at hand spans; where the environment says nothing, GCE's metadata server knows."""
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if hosts := environment.get(name):
            return len(hosts.split(","))
    if importlib.util.find_spec("libtpu") is None or "tpu" not in (environment.get("JAX_PLATFORMS") or "tpu"):
        return 1
    url = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
        return len(answer.read().split(b","))
    return 1


def _in_a_cluster(environment):
    """Whether more than one process takes part, by the variables that jax.distributed reads as well."""
    # Not SLURM_NTASKS, which sbatch's script has too, where one process runs.
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
    return any(int(environment.get(name) or 1) > 1 for name in counts) or _tpu_hosts(environment) > 1
