"""The trainer's command with a witness: writes down which batch each step took and when an evaluation begins.

python driver.py LOG [RECIPE] [--switch value ...]

Curves and mistakes are drawn with DRAW=1 only, since it takes seconds.
With HOLD="step 15", or another line of the log, it goes on after that line only once there is a file LOG.go.
"""

import builtins
import hashlib
import importlib.util
import os
import resource
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np

from res2net_jax import command_line
from train import checkpoints, claim, devices, imagenet, report, run_folder


def watched(log):
    """Replaces the functions by which the program gets its data."""
    train_batches, eval_batches, open_splits = imagenet.train_batches, imagenet.eval_batches, imagenet.open_splits

    class Watched:
        """The batches of ``inner``, each noted as ``step <number> <digest>`` when it is handed out."""

        def __init__(self, inner, start):
            self.inner, self.number = inner, start

        def __iter__(self):
            return self

        def __next__(self):
            time.sleep(float(os.environ.get("STEP_PAUSE", 0)))
            fail(self.number + 1)
            batch = next(self.inner)
            digest = hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest()
            self.number += 1
            limit_files(self.number)
            note(f"step {self.number} {digest}")
            return batch

        def __getattr__(self, name):
            return getattr(self.inner, name)

    class Slow:
        """The batches of an evaluation, each noted as ``evaluated`` when it is handed out."""

        def __init__(self, inner):
            self.inner = inner

        def __iter__(self):
            return self

        def __next__(self):
            time.sleep(float(os.environ.get("EVALUATION_PAUSE", 0)))
            batch = next(self.inner)
            note("evaluated")
            return batch

        def close(self):
            self.inner.close()

    def note(line):
        with open(log, "a") as file:
            file.write(line + "\n")
        if hold := os.environ.get("HOLD"):
            while line.startswith(hold) and not os.path.exists(f"{log}.go"):
                time.sleep(0.02)

    def watched_eval(*args, **options):
        note("evaluation")
        batches = eval_batches(*args, **options)
        # An evaluation of some length, for a signal to hit it.
        return Slow(batches)

    def watched_open(config):
        fail(0)
        return open_splits(config)

    imagenet.open_splits = watched_open
    imagenet.train_batches = lambda *args, start, **options: Watched(
        train_batches(*args, start=start, **options), start
    )
    imagenet.eval_batches = watched_eval


def digits_alone():
    """Puts what the trainer takes of scikit-learn, the digits, in its place: to import it takes as long as a run."""
    (package,) = importlib.util.find_spec("sklearn").submodule_search_locations

    def load_digits():
        rows = np.loadtxt(Path(package, "datasets/data/digits.csv.gz"), delimiter=",")
        return types.SimpleNamespace(images=rows[:, :-1].reshape(-1, 8, 8), target=rows[:, -1].astype(int))

    datasets = types.ModuleType("sklearn.datasets")
    datasets.load_digits = load_digits
    sys.modules |= {"sklearn": types.ModuleType("sklearn"), "sklearn.datasets": datasets}


def fail(step):
    """With FAIL="PROCESS STEP ERROR" this process gets this error for data at this step; step 0 is the beginning."""
    if failure := os.environ.get("FAIL"):
        process, at, kind = failure.split()
        if step == int(at) and jax.process_index() == int(process):
            raise getattr(builtins, kind)("unplugged")


def break_devices():
    """With BREAK="PROCESS BATCH" this process's devices have no memory for this batch, of training or evaluation."""
    place, batches = devices.global_arrays, 0
    process, broken = map(int, os.environ["BREAK"].split())

    def global_arrays(tree, sharding):
        nonlocal batches
        if "stop" in tree and "image" in tree:
            batches += 1
            if (jax.process_index(), batches) == (process, broken):
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: broken")
        return place(tree, sharding)

    devices.global_arrays = global_arrays


def stale(see):
    """With STALE="PROCESS STEP TIMES" this process does not see the checkpoint of this step so many times."""
    looks = 0

    def steps(folder):
        nonlocal looks
        process, hidden, times = map(int, os.environ["STALE"].split())
        seen = see(folder)
        if jax.process_index() != process or hidden not in seen:
            return seen
        looks += 1
        if looks <= times:
            return {step: path for step, path in seen.items() if step != hidden}
        print(f"process {process} looked {looks - 1} times in vain", flush=True)
        return seen

    return steps


def limit_files(step):
    """From the first to the second step of FILE_LIMIT="BYTES FIRST SECOND" no file may grow beyond so many bytes."""
    if limit := os.environ.get("FILE_LIMIT"):
        size, first, second = map(int, limit.split())
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size if first <= step < second else hard, hard))


if __name__ == "__main__":
    watched(sys.argv.pop(1))
    digits_alone()
    if attempts := os.environ.get("SAVE_ATTEMPTS"):
        checkpoints.ATTEMPTS, checkpoints.PAUSE = int(attempts), 0.1
    if "BREAK" in os.environ:
        break_devices()
    if "STALE" in os.environ:
        run_folder.saved_in = stale(run_folder.saved_in)
    claim.PATIENCE = int(os.environ.get("SHARE_ATTEMPTS", claim.PATIENCE))
    if "DRAW" not in os.environ:
        report.draw_curves = imagenet.draw_mistakes = lambda *_: None
    command_line.main(imagenet.command)
