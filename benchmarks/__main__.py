"""Speed beside timm, as a ratio in one run.

    python -m benchmarks inference [--models res2net50_14w_8s ...] [--batches 1 8 32]
    python -m benchmarks train [--batches 8 16]

All runners of a row take turns, round after round, in one process with as many threads each, so that what
disturbs the machine disturbs all. The figure is the median of the rounds. float32 on the CPU; bfloat16
(torch: autocast, channels_last) on a GPU.
"""

import csv
import dataclasses
import functools
import platform
import statistics
import time
from pathlib import Path
from typing import Annotated, Literal

import jax
import torch
import tyro

from benchmarks import runners
from res2net_jax.command_line import main, table
from res2net_jax.files import versions

MISSION = (
    "res2net50_26w_4s",
    "res2net50_26w_6s",
    "res2net50_26w_8s",
    "res2net50_48w_2s",
    "res2net50_14w_8s",
    "res2net101_26w_4s",
)
RUNNERS = {
    "inference": {
        "res2net_jax": runners.ours_inference,
        "timm eager": functools.partial(runners.timm_inference, compiled=False),
        "timm torch.compile": functools.partial(runners.timm_inference, compiled=True),
    },
    "train": {
        "res2net_jax": runners.ours_train,
        "timm eager": functools.partial(runners.timm_train, compiled=False),
        "timm torch.compile": functools.partial(runners.timm_train, compiled=True),
    },
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Times a task beside timm, and writes a table and a CSV."""

    task: Annotated[Literal["inference", "train"], tyro.conf.Positional]
    models: tuple[str, ...] = MISSION
    batches: tuple[int, ...] = (8,)
    rounds: int = 7
    """Measurements of each runner; the median counts."""
    seconds: float = 1.0
    """A measurement repeats the task at least this long."""
    results: Path = Path("benchmarks/results")


def run(arguments: list[str]) -> None:
    options = tyro.cli(Options, prog="python -m benchmarks", args=arguments)
    names = list(RUNNERS[options.task])
    rows = [("model", "batch", *(f"{name} (ms)" for name in names), *(f"{name} / ours" for name in names[1:]))]
    for model in options.models:
        for batch in options.batches:
            medians = measure(options.task, model, batch, options.rounds, options.seconds)
            ratios = [f"{medians[name] / medians[names[0]]:.2f}" for name in names[1:]]
            rows.append((model, str(batch), *(f"{1e3 * medians[name]:.1f}" for name in names), *ratios))
            print(table([rows[0], rows[-1]]).splitlines()[-1], flush=True)
    write(options, rows)


def measure(task: str, model: str, batch: int, rounds: int, seconds: float) -> dict[str, float]:
    """Median seconds of one execution for each runner."""
    made = {name: make(model, batch) for name, make in RUNNERS[task].items()}
    repeats = {}
    for name, execute in made.items():
        execute()  # compiles
        start = time.perf_counter()
        execute()
        repeats[name] = max(1, round(seconds / (time.perf_counter() - start)))
    times = {name: [] for name in made}
    for _ in range(rounds):
        for name, execute in made.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                execute()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(values) for name, values in times.items()}


def write(options: Options, rows: list[tuple[str, ...]]) -> None:
    """``RESULTS/TASK-DEVICE.csv``, and the same as text with the versions."""
    device = jax.devices()[0]
    kind = "cpu" if device.platform == "cpu" else device.device_kind.replace(" ", "-").lower()
    options.results.mkdir(parents=True, exist_ok=True)
    stem = options.results / f"{options.task}-{kind}"
    with open(stem.with_suffix(".csv"), "w", newline="") as file:
        csv.writer(file).writerows(rows)
    processor = _processor() if kind == "cpu" else device.device_kind
    about = [
        f"{options.task}, {processor}, {torch.get_num_threads()} threads, median of {options.rounds}",
        ", ".join(f"{name} {version}" for name, version in versions("jax", "flax", "torch", "timm").items()),
    ]
    stem.with_suffix(".txt").write_text("\n".join([*about, "", table(rows), ""]))
    print("\n".join(["", *about, "", table(rows)]))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main(run)
