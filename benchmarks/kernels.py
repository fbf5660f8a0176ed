"""Where the time of a call goes on a GPU, kernel by kernel, as jax.profiler sees it."""

import collections
import dataclasses
import glob
import tempfile
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import tyro

from benchmarks import ours, results

CALLS = 3
LONGEST = 15
GROUPS = {  # by the first that the operation's name begins with, else that the kernel's holds
    "cudnn-conv-bw-filter": "convolutions, gradients of kernels",
    "cudnn-conv-bw-input": "convolutions, gradients of images",
    "cudnn-conv": "convolutions",
    "wgrad": "convolutions, gradients of kernels",  # in a CUDA graph no operation is named
    "dgrad": "convolutions, gradients of images",
    "fprop": "convolutions",
    "nvjet": "matrix products",
    "gemm": "matrix products",
    "cutlass": "matrix products",
    "splitK": "matrix products",
    "concatenate": "concatenations",
    "reduce": "reductions",
    "fusion": "elementwise",
    "wrapped": "elementwise",
}


class Kernel(NamedTuple):
    """One launch: the HLO operation it is of, its own name, and from when to when it ran (ns)."""

    operation: str
    name: str
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Options:
    """Profiles a few calls on a GPU."""

    task: Literal["inference", "train"] = "train"
    model: str = "res2net50_14w_8s"
    batch: int = 64
    results: Path = results.FOLDER


def run(task: str, arguments: list[str]) -> None:
    options = tyro.cli(Options, prog=f"python -m benchmarks {task}", args=arguments)
    if jax.default_backend() != "gpu":
        raise ValueError(f"only kernels of a GPU are looked at; JAX computes on {jax.default_backend()}")
    call = getattr(ours, options.task)(options.model, options.batch)
    for _ in range(CALLS):
        call()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(CALLS):
                call()
        kernels = profiled(folder)
    busy, span = busy_and_span(kernels)
    remark = (
        f"{options.task} of {options.model} at batch {options.batch}, bfloat16; while it is profiled a call takes "
        f"{span / CALLS / 1e6:.2f} ms, {busy / span:.0%} of it in {len(kernels) / CALLS:.0f} kernels; longest last"
    )
    rows = summary(kernels, CALLS)
    print(results.write(task, rows, remark, ("jax", "flax"), options.results))


def profiled(folder: str) -> list[Kernel]:
    """All launches in the profile that jax.profiler wrote to ``folder``."""
    (file,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    planes = jax.profiler.ProfileData.from_file(file).planes
    lines = [line for plane in planes if "GPU" in plane.name for line in plane.lines if "Stream" in line.name]
    return [
        Kernel(str(dict(event.stats).get("hlo_op", "")), event.name, event.start_ns, event.end_ns)
        for line in lines
        for event in line.events
    ]


def busy_and_span(kernels: list[Kernel]) -> tuple[float, float]:
    """Nanoseconds in which any of ``kernels`` ran, and from the first one's start to the last one's end."""
    busy, until = 0.0, 0.0
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        busy += max(0.0, kernel.end - max(kernel.start, until))
        until = max(until, kernel.end)
    return busy, until - min(kernel.start for kernel in kernels)


def group(kernel: Kernel) -> str:
    """What ``kernel`` does; its own name if that is not known."""
    starts = (name for start, name in GROUPS.items() if kernel.operation.startswith(start))
    return next(starts, None) or next((name for part, name in GROUPS.items() if part in kernel.name), kernel.name[:60])


def summary(kernels: list[Kernel], calls: int) -> list[tuple[str, ...]]:
    """Milliseconds and kernels a call, by group and then by kernel, and the share of all kernels' time."""
    total = sum(kernel.end - kernel.start for kernel in kernels)
    rows = [("kernels", "ms a call", "share", "number", "us each")]
    for key, most in ((group, None), (lambda kernel: kernel.name[:100], LONGEST)):
        durations = collections.defaultdict(list)
        for kernel in kernels:
            durations[key(kernel)].append(kernel.end - kernel.start)
        for name, spent in sorted(durations.items(), key=lambda item: -sum(item[1]))[:most]:
            whole, count = sum(spent), len(spent)
            each = (
                f"{whole / calls / 1e6:.3f}",
                f"{whole / total:.1%}",
                f"{count / calls:.0f}",
                f"{whole / count / 1e3:.1f}",
            )
            rows.append((name, *each))
    return rows
