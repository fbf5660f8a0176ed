"""Seconds that XLA takes to compile, and memory: of 50 and of 101 layers, at batch 8, each in a fresh process."""

import json
import os
import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp

import res2net_jax
from benchmarks import results
from benchmarks.runners import train_step
from res2net_jax.backend import compiler_options

MODELS = ("res2net50_26w_4s", "res2net101_26w_4s")
BATCH = 8


def run(task: str, arguments: list[str]) -> None:
    if arguments:
        raise ValueError(f"compilation takes no options; got {' '.join(arguments)}")
    head = ("model", "program", "trace (s)", "compile (s)", "weights and state (MB)", "temporary (MB)", "peak RSS (MB)")
    rows, environment = [head], {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    for name in MODELS:
        for program in ("inference", "train"):
            command = [sys.executable, "-m", "benchmarks.compilation", name, program]
            output = subprocess.check_output(command, text=True, env=environment)
            rows.append((name, program, *json.loads(output.splitlines()[-1])))
    results.write(task, rows, f"batch {BATCH} at 224, no compilation cache", ("jax", "flax"))


def measure(name: str, program: str) -> list[str]:
    """The figures of one row, of this process."""
    if program == "inference":
        model = res2net_jax.fuse(res2net_jax.create(name).eval())
        function = jax.jit(lambda model, images: model(images), compiler_options=compiler_options())
        arguments = model, jax.ShapeDtypeStruct((BATCH, 224, 224, 3), jnp.float32)
    else:
        function, state, batch = train_step(name, BATCH)
        arguments = *state, *batch
    start = time.perf_counter()
    lowered = function.lower(*arguments)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    memory = compiled.memory_analysis()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes, peak
    return [f"{traced - start:.1f}", f"{done - traced:.1f}", *(f"{size / 1e6:.0f}" for size in sizes)]


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
