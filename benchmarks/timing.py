"""Inference and training: all runners of a row take turns, round after round, in one process.

So what disturbs the machine disturbs all. The figure is the median of the rounds. float32 on the CPU, with as many
threads for each; bfloat16 (torch: autocast and channels_last) on a GPU.
"""

import dataclasses
import functools
import statistics
import time
from pathlib import Path

import jax
import tyro

from benchmarks import peers, results, runners
from res2net_jax.command_line import table

MODELS = (
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
        "torch.compile": functools.partial(runners.timm_inference, compiled=True),
        "zeromodels": peers.keras_inference,
        "ONNX Runtime": peers.onnx_inference,
    },
    "train": {
        "res2net_jax": runners.ours_train,
        "timm eager": functools.partial(runners.timm_train, compiled=False),
        "torch.compile": functools.partial(runners.timm_train, compiled=True),
    },
}
PACKAGES = ("jax", "flax", "torch", "timm", "zeromodels", "keras", "onnxruntime")


@dataclasses.dataclass(frozen=True)
class Options:
    """Times forward passes or training steps."""

    models: tuple[str, ...] = MODELS
    batches: tuple[int, ...] = ()
    """By default 1, 8 and 32 for inference, 8 and 16 for training."""
    rounds: int = 7
    """Measurements of each runner; the median counts."""
    seconds: float = 1.0
    """A measurement repeats the task at least this long."""
    results: Path = results.FOLDER


def run(task: str, arguments: list[str]) -> None:
    options = tyro.cli(Options, prog=f"python -m benchmarks {task}", args=arguments)
    if (jax.default_backend() == "gpu") != runners.ON_GPU:
        raise ValueError(
            f"JAX computes on {jax.default_backend()} and torch on {'a GPU' if runners.ON_GPU else 'the CPU'}; install "
            "both for the same, e.g. pip install '.[benchmark,cuda]'"
        )
    names = [name for name in RUNNERS[task] if not (runners.ON_GPU and name == "ONNX Runtime")]
    rows = [("model", "batch", *(f"{name} (ms)" for name in names), *(f"{name} / ours" for name in names[1:]))]
    for model in options.models:
        for batch in options.batches or {"inference": (1, 8, 32), "train": (8, 16)}[task]:
            medians = measure({name: RUNNERS[task][name] for name in names}, model, batch, options)
            ratios = [f"{medians[name] / medians[names[0]]:.2f}" for name in names[1:]]
            rows.append((model, str(batch), *(f"{1e3 * medians[name]:.1f}" for name in names), *ratios))
            print(table([rows[0], rows[-1]]).splitlines()[-1], flush=True)
    remark = f"{runners.THREADS} threads each, median of {options.rounds}; above 1 we are the faster"
    results.write(task, rows, remark, PACKAGES, options.results)


def measure(makers: dict, model: str, batch: int, options: Options) -> dict[str, float]:
    """Median seconds of one execution for each runner."""
    made = {name: make(model, batch) for name, make in makers.items()}
    repeats = {}
    for name, execute in made.items():
        execute()  # compiles
        start = time.perf_counter()
        execute()
        repeats[name] = max(1, round(options.seconds / (time.perf_counter() - start)))
    times = {name: [] for name in made}
    for _ in range(options.rounds):
        for name, execute in made.items():
            execute()  # what the runner before left in the caches is not this one's
            start = time.perf_counter()
            for _ in range(repeats[name]):
                execute()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(values) for name, values in times.items()}
