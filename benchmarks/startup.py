"""From the start of a fresh process to its first answer: ours from a checkpoint, timm's from a file.

Caches are warm on both sides: the files in the page cache, our program in JAX's compilation cache, as the commands keep
it. A third process compiles it anew, as a program does that has not switched that cache on. All compute in float32 on
the same device, and take turns.
"""

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
import tyro

import res2net_jax
from benchmarks import results

OURS = """
import sys, numpy, res2net_jax
from res2net_jax.backend import use_compilation_cache
use_compilation_cache()
model = res2net_jax.compile(res2net_jax.load(sys.argv[1]))
print(numpy.asarray(model(numpy.zeros((1, 224, 224, 3), numpy.float32))).shape, flush=True)
"""
UNCACHED = OURS.replace("use_compilation_cache()\n", "")
TIMM = """
import sys, timm, torch
device = "cuda" if torch.cuda.is_available() else "cpu"
model = timm.create_model(sys.argv[2], checkpoint_path=sys.argv[1]).eval().to(device)
with torch.inference_mode():
    print(model(torch.zeros(1, 3, 224, 224, device=device)).cpu().numpy().shape, flush=True)
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """Times fresh processes."""

    models: tuple[str, ...] = ("res2net50_14w_8s", "res2net101_26w_4s")
    rounds: int = 7
    results: Path = results.FOLDER


def run(task: str, arguments: list[str]) -> None:
    options = tyro.cli(Options, prog="python -m benchmarks startup", args=arguments)
    times_of = ("res2net_jax (s)", "compiled anew (s)", "timm (s)")
    rows = [("model", "until", *times_of, "timm / ours", "timm / ours compiled anew")]
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            res2net_jax.save(res2net_jax.create(name).eval(), f"{folder}/{name}")
            torch.save(timm.create_model(name).state_dict(), f"{folder}/{name}.pth")
            commands = [(code, f"{folder}/{name}") for code in (OURS, UNCACHED)] + [(TIMM, f"{folder}/{name}.pth")]
            for command in commands:
                _seconds(*command, name, folder)  # warms the caches
            times = [[_seconds(*command, name, folder) for command in commands] for _ in range(options.rounds)]
            for moment, until in enumerate(("first answer", "end of process")):
                ours, uncached, theirs = (statistics.median(turn[i][moment] for turn in times) for i in range(3))
                ratios = theirs / ours, theirs / uncached
                rows.append((name, until, *(f"{value:.2f}" for value in (ours, uncached, theirs, *ratios))))
    remark = f"median of {options.rounds}, in turns; load, compile and one image at 224"
    print(results.write(task, rows, remark, ("jax", "flax", "orbax-checkpoint", "torch", "timm"), options.results))


def _seconds(code, file, name, folder):
    """From the start of a process to its answer, and to its end."""
    environment = {**os.environ, "RES2NET_JAX_HOME": f"{folder}/home"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-c", code, file, name]
    start = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        answered = time.perf_counter() - start
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command[:2])
    return answered, time.perf_counter() - start
