import contextlib
import dataclasses
import itertools
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from PIL import Image

from train.config import RECIPES
from train.imagenet import main
from train.signals import StopRequest

ROOT = Path(__file__).parents[2]
# A network and pictures small enough for a run of seconds.
TINY = [
    *("--layers", "1", "1", "--channels", "8", "8", "--scale", "3"),
    *("--size", "16", "--batch-size", "32", "--epochs", "2", "--log-every", "10"),
]
# XLA aborts a program one of whose devices is late by 40 seconds, which on a busy machine means nothing. And these tiny
# programs take longer to compile than to run; an XLA that does not know the extra option ignores it.
XLA_FLAGS = (
    "--xla_cpu_collective_call_terminate_timeout_seconds=600 "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)


@pytest.fixture
def launch():
    """``launch(output, *switches, ...)`` starts the trainer on the digits and returns its processes.

    What the witness writes goes to ``output``.log, what the program prints to ``output``.txt; of several
    processes each has its own file, with its number before the suffix; ``own`` holds switches of single ones.
    """
    started = []

    def launch(output, *switches, processes=1, devices=1, cache=True, tiny=True, own=None, **environment):
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {XLA_FLAGS}",
            "PYTHONPATH": str(ROOT),
            "JAX_ENABLE_COMPILATION_CACHE": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            **environment,
        }
        together = []
        port = free_port()
        for number in range(processes):
            suffix = f".{number}" if processes > 1 else ""
            command = [sys.executable, str(ROOT / "tests/train/driver.py"), f"{output}{suffix}.log", "digits"]
            command += [*(TINY if tiny else []), "--output", str(output), *map(str, switches)]
            if processes > 1:
                command += ["--coordinator", f"localhost:{port}", "--num-processes", str(processes)]
                command += ["--process-id", str(number), *((own or {}).get(number, ()))]
            with open(f"{output}{suffix}.txt", "a") as file:
                together.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file))
        started.extend(together)
        return together

    yield launch
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.fixture
def finish(launch):
    """``finish(output, *switches, ...)`` runs the trainer to its end, which must be a good one."""

    def finish(output, *switches, **options):
        for process in launch(output, *switches, **options):
            assert process.wait(300) == 0, printed(output)

    return finish


def small(tmp_path, **changes):
    """The digits' recipe with a network of one block and two steps; ``changes`` are fields of it."""
    fields = {"layers": (1,), "channels": (8,), "scale": 2, "size": 16, "steps": 2, "output": str(tmp_path / "run")}
    return dataclasses.replace(RECIPES["digits"](), **{**fields, **changes})


def train(config):
    """Runs the trainer in this process; its exit code."""
    with StopRequest() as stop:
        return main(config, stop)


def printed(output):
    """What the run's processes wrote to the terminal."""
    return "\n".join(path.read_text() for path in sorted(output.parent.glob(f"{output.name}*.txt")))


#: Below the ports that the system gives to outgoing connections, and others for each worker of a parallel test run.
_PORTS = itertools.count(10_000 + 100 * (os.getpid() % 200))


def free_port():
    """A port that nobody uses, and that nobody takes before it is used."""
    for port in _PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def steps(output):
    """Numbers of the checkpoints of a run."""
    folder = output / "checkpoints"
    return sorted(int(child.name) for child in folder.iterdir() if child.name.isdigit()) if folder.is_dir() else []


def arrays(output, step=None):
    """All arrays of a checkpoint, by default the last one's, as numpy."""
    folder = output / "checkpoints" / str(step or steps(output)[-1])
    stored = ocp.checkpointables_metadata(folder).metadata
    # As numpy arrays, for jax's would be float32 outside a float64 program.
    target = {
        item: {path: np.empty(x.shape, x.dtype) for path, x in stored[item].items()} for item in ("model", "training")
    }
    loaded = ocp.load_checkpointables(folder, target)
    return {f"{item}/{path}": x for item in target for path, x in loaded[item].items()}


def batches(output):
    """Step -> the digests of the batches it took, over all attempts and processes of a run."""
    seen = {}
    for log in sorted(output.parent.glob(f"{output.name}*.log")):
        for line in log.read_text().splitlines():
            if line.startswith("step "):
                _, step, digest = line.split()
                seen.setdefault((log.name.removeprefix(output.name), int(step)), set()).add(digest)
    return seen


@pytest.fixture
def pictures(tmp_path):
    """``train`` and ``val`` of two classes of eight and two pictures."""
    for split, count in (("train", 8), ("val", 2)):
        for label in "ab":
            (tmp_path / "pictures" / split / label).mkdir(parents=True)
            for i in range(count):
                picture = Image.new("RGB", (24, 24), (i * 20, 90 * (label == "a"), len(split)))
                picture.save(tmp_path / "pictures" / split / label / f"{i}.png")
    return tmp_path / "pictures"


def of_pictures(tmp_path, pictures, **changes):
    return small(tmp_path, dataset=f"folder:{pictures}", batch_size=4, **changes)
