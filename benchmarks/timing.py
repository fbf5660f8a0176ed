"""Inference and training: all runners of a row take turns, round after round, each in a process of its own.

So what disturbs the machine disturbs all. The figure is the median of the turns; where two cores share a cache now and
then do not, of either sort apart (``benchmarks.cores``). float32 on the CPU, with as many threads for each; bfloat16
(torch: channels_last, in training autocast) on a GPU.
"""

import contextlib
import dataclasses
import functools
import statistics
import sys
from pathlib import Path

import jax
import tyro

from benchmarks import ours, peers, results, torch_peer
from benchmarks.cores import FAR
from benchmarks.turns import Runners
from res2net_jax.command_line import table
from res2net_jax.variants import VARIANTS

MODELS = (
    "res2net50_26w_4s",
    "res2net50_26w_6s",
    "res2net50_26w_8s",
    "res2net50_48w_2s",
    "res2net50_14w_8s",
    "res2net101_26w_4s",
)
# A torch.compile that replays CUDA graphs, as XLA does, is its faster mode for small batches on a GPU.
TORCH = {"timm eager": "eager", "torch.compile": "default"}
TORCH |= {"torch.compile, CUDA graphs": "reduce-overhead"} if torch_peer.ON_GPU else {}
# What a user of torch.compile has to ask for, as of CUDA graphs.
FROZEN = {} if torch_peer.ON_GPU else {"torch.compile, frozen": "freezing"}
RUNNERS = {
    "inference": {
        "res2net_jax": ours.inference,
        **{name: functools.partial(torch_peer.inference, mode=mode) for name, mode in (TORCH | FROZEN).items()},
        "zeromodels": peers.keras_inference,
        **({} if torch_peer.ON_GPU else {"ONNX Runtime": peers.onnx_inference}),
    },
    "train": {
        "res2net_jax": ours.train,
        **{name: functools.partial(torch_peer.train, mode=mode) for name, mode in TORCH.items()},
    },
}
BATCHES = {"inference": (1, 8, 64, 256), "train": (64, 256)}
BATCHES = BATCHES if torch_peer.ON_GPU else {"inference": (1, 8, 32), "train": (8, 16)}
PACKAGES = ("jax", "flax", "torch", "timm", "zeromodels", "keras", "onnxruntime")


@dataclasses.dataclass(frozen=True)
class Options:
    """Times forward passes or training steps."""

    models: tuple[str, ...] = MODELS
    batches: tuple[int, ...] = ()
    """By default 1, 8 and 32 for inference, 8 and 16 for training; on a GPU 1, 8, 64 and 256, and 64 and 256."""
    rounds: int = 7
    """Turns of each runner."""
    seconds: float = 1.0
    """A measurement repeats the task at least this long."""
    at_once: bool = False
    """Compile for all rows at once, then time them: in minutes for an hour, where the memory holds them all."""
    results: Path = results.FOLDER

    def __post_init__(self):
        if unknown := [name for name in self.models if name not in VARIANTS and name != "resnet50"]:
            raise ValueError(f"--models: there is no {unknown[0]}; the usual ones are {', '.join(MODELS)}")
        if not self.models or min(self.batches, default=1) < 1 or self.rounds < 1 or self.seconds <= 0:
            raise ValueError("--models names at least one; --batches, --rounds and --seconds are above 0")


def run(task: str, arguments: list[str]) -> None:
    options = tyro.cli(Options, prog=f"python -m benchmarks {task}", args=arguments)
    if jax.default_backend() != ("gpu" if torch_peer.ON_GPU else "cpu"):
        raise ValueError(
            f"JAX computes on {jax.default_backend()} and torch on {'a GPU' if torch_peer.ON_GPU else 'the CPU'}; "
            "install both for the same, e.g. pip install '.[benchmark,cuda]'"
        )
    first, *others = names = list(RUNNERS[task])
    figures = (*(f"{name} (ms)" for name in names), *(f"{name} / ours" for name in others))
    rows = [("model", "batch", "cores", "turns", *figures)]
    kind = "bfloat16" if torch_peer.ON_GPU else f"float32, {torch_peer.THREADS} threads each"
    remark = f"{kind}, medians; above 1 we are the faster; cores are near within {FAR} ns there and back"
    tasks = [(model, batch) for model in options.models for batch in options.batches or BATCHES[task]]
    # Not over the whole table.
    name_of_table = task if {(m, b) for m in MODELS for b in BATCHES[task]} <= {*tasks} else f"{task}-part"
    failed = []
    with contextlib.ExitStack() as stack:
        started = {}
        for model, batch in tasks if options.at_once else ():
            runners = Runners(RUNNERS[task], model, batch, options.seconds, at_once=True)
            started[model, batch] = stack.enter_context(runners)
        for model, batch in tasks:
            try:
                with started.get((model, batch)) or Runners(RUNNERS[task], model, batch, options.seconds) as runners:
                    found = runners.turns(options.rounds)
            except RuntimeError as error:
                print(error, file=sys.stderr)
                failed.append(f"{model} at {batch}")
                continue
            for place, turns in found.items():
                medians = {name: statistics.median(durations) for name, durations in turns.items()}
                milliseconds = [f"{1e3 * medians[name]:.1f}" if name in medians else "" for name in names]
                ratios = [f"{medians[name] / medians[first]:.2f}" if name in medians else "" for name in others]
                rows.append((model, str(batch), place, str(min(map(len, turns.values()))), *milliseconds, *ratios))
                print(table([rows[0], rows[-1]]).splitlines()[-1], flush=True)
            text = results.write(name_of_table, rows, remark, PACKAGES, options.results)  # hours may follow
    if rows[1:]:
        print(f"\n{text}")
    if failed:
        raise ValueError(f"res2net_jax did not run {', '.join(failed)}; the other rows are kept")
