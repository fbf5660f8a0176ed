"""Seconds that XLA takes to compile, and memory: of 50 and of 101 layers, at batch 8, each in a fresh process.

"Peak RSS" is the most that the process held on the host, until the program has run once; ``load`` reads a checkpoint,
and ``import`` is what any of them holds before. Inference is of one program for the batch; on two cores a compiled
model takes two of half of it (``res2net_jax.per_core``). Linux only.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import res2net_jax
from benchmarks import ours, results
from res2net_jax import fusion

MODELS = ("res2net50_26w_4s", "res2net101_26w_4s")
BATCH = 8


def run(task: str, arguments: list[str]) -> None:
    if arguments:
        raise ValueError(f"compilation takes no options; got {' '.join(arguments)}")
    head = ("model", "program", "trace (s)", "compile (s)", "weights and state (MB)", "temporary (MB)", "peak RSS (MB)")
    rows, environment = [head], {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            res2net_jax.save(res2net_jax.create(name).eval(), f"{folder}/{name}")
            for program in ("import", "load", "inference", "train"):
                command = [sys.executable, "-m", "benchmarks.compilation", program, name, folder]
                output = subprocess.check_output(command, text=True, env=environment)
                rows.append((name, program, *json.loads(output.splitlines()[-1])))
    remark = f"batch {BATCH} at 224, no compilation cache"
    print(results.write(task, rows, remark, ("jax", "flax", "orbax-checkpoint")))


def measure(program: str, name: str, folder: str) -> list[str]:
    """The figures of one row, of this process."""
    figures = ["", "", "", ""]
    if program == "load":
        jax.block_until_ready(res2net_jax.load(f"{folder}/{name}"))
    elif program == "inference":
        function, weights = fusion.program(res2net_jax.Res2Net.__call__, ours.create(name).eval())
        figures = _compile_and_run(function, weights, jnp.asarray(ours.images_and_labels(BATCH)[0]))
    elif program == "train":
        function, state, batch = ours.train_step(name, BATCH)
        figures = _compile_and_run(function, *state, *batch)
    # Not getrusage's maximum: it is at least what the parent held when it started this process.
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    return [*figures, f"{peak / 1e6:.0f}"]


def _compile_and_run(function, *arguments):
    start = time.perf_counter()
    lowered = function.lower(*arguments)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    memory = compiled.memory_analysis()
    jax.block_until_ready(compiled(*arguments))
    sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return [f"{traced - start:.1f}", f"{done - traced:.1f}", *(f"{size / 1e6:.0f}" for size in sizes)]


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
