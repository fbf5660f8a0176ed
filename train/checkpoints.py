"""The state of a run on disk: saved in the background, checked when it is read, the damaged passed over.

A checkpoint is a numbered folder with two items. ``model`` is what was evaluated (the averaged weights
if the run averages them), readable by :func:`res2net_jax.load`. ``training`` is what else the run needs to go
on: the step, the momentum, and with averaging the raw weights. The position in the data is the step, for a
batch depends on nothing but the seed and the step. The metadata holds the config, the evaluation's result and a
checksum of all arrays, since Orbax itself does not notice a flipped bit; and one of each of the model's, for ``load``.
"""

import contextlib
import functools
import logging
import sys
import time
from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp

from res2net_jax import command_line
from res2net_jax.checkpoint import crc32
from res2net_jax.command_line import say
from res2net_jax.files import first_line, remove_tree
from res2net_jax.metadata import describe, require_format, stored_metadata
from res2net_jax.model import Res2Net
from train import run_folder
from train.config import Config, to_json
from train.devices import everywhere, largest, of_the_first, together
from train.same_run import require_same_run
from train.step import State, fingerprint, from_items, to_items

#: Attempts at the last save of a process, and seconds between two of them.
ATTEMPTS, PAUSE = 30, 10.0


class NotSaved(Exception):
    """The last state of a run could not be stored."""


class Checkpoints:
    """The checkpoints of one run, in ``folder``. All processes call every method at the same step.

    Args:
        folder: Parent of the numbered folders; shared by all processes.
        config: The run's config.
        model: The model, for the description that :func:`res2net_jax.load` reads: its architecture, class names
            and preprocessing.
        examples: How many pictures there are to learn from. With another number the order would be another one.
        checksums: Of what the run began with, by name (:func:`train.start.checksums`).
    """

    def __init__(self, folder: Path, config: Config, model: Res2Net, examples: int, checksums: dict[str, int]):
        # When files are damaged or a disk is full, these print a traceback for every array; _warn says it in a line.
        for logger in ("absl", "asyncio"):
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        self.folder = folder.absolute()
        self.config = config
        source = {"trained by": "python -m train.imagenet", "dataset": config.dataset}
        self._description = describe(model, source=source)
        self._examples = examples
        self._checksums = checksums
        self._fingerprint = jax.jit(fingerprint)
        self._retry_after = max(1, config.checkpoint_every // 10)
        self._check_at = None
        self._saving = None
        self._checkpointer = None

    def restore(self, state: State) -> tuple[State, dict] | None:
        """The newest undamaged state, and the ``evaluation`` and ``window`` that were saved with it; or None.

        Args:
            state: A state of the shapes, dtypes and shardings to restore.

        Raises:
            ValueError: The checkpoints are of another config, model, data or format, or none of them can be read.
            OSError: One cannot be read just now, which is no damage; all of them are left as they were.
        """
        together(lambda: run_folder.put_right(self.folder))
        # Process 0's, for a file server may show another host an older listing.
        steps = of_the_first(together(lambda: [*run_folder.saved_in(self.folder)]))
        run_folder.wait_until_visible(self.folder, steps)
        damaged = {}
        for step in steps:
            restored, problem = self._read(step, state)
            if problem:
                restored, problem = self._read(step, state)  # a disk or a network may have erred once
            if restored:
                # Only now: what no checkpoint passes is the fault of something else, such as another version of Optax.
                for other, problem in damaged.items():
                    _warn(f"checkpoint {other} is damaged: {problem}. Going back to checkpoint {step}")
                    together(functools.partial(run_folder.mark_damaged, self.folder, other))
                return restored
            damaged[step] = problem
        if damaged:
            raise ValueError(
                f"no checkpoint in {self.folder} can be read, the newest because: {damaged[steps[0]]}; they are left "
                "as they were. If packages have changed since they were saved, install those again; else give another "
                "--output to start anew"
            )
        return None

    def due(self, step: int) -> bool:
        """Whether to save at ``step``: every ``config.checkpoint_every`` steps, and soon after a failed save."""
        failed = step == self._check_at and not self._settle()
        return failed or step % self.config.checkpoint_every == 0

    def save(
        self, step: int, state: State, window: list[dict[str, float]], evaluation: dict[str, float] | None = None
    ) -> None:
        """Starts to save in the background. If it fails this warns, and :meth:`due` asks for another attempt.

        Args:
            step: Steps done.
            state: The state after them.
            window: :attr:`train.report.Report.window`.
            evaluation: The result, if the state was evaluated.
        """
        self._settle()
        saved = self._saved(step)
        if saved and evaluation is None:
            return
        items = to_items(state)
        metadata = {
            **self._description,
            "crc32": {path: crc32(array) for path, array in items["model"].items()},
            "train": {
                "step": step,
                "config": to_json(self.config),
                "examples": self._examples,
                "checksums": self._checksums,
                "evaluation": evaluation,
                "window": list(window),  # written when the arrays are, while the run continues
                "fingerprint": int(self._fingerprint(items)),
            },
        }
        self._check_at = step + self._retry_after
        try:
            if saved:  # with its evaluation; Orbax would delete the old one before the new one is there
                self._forget()
                together(lambda: run_folder.set_aside(self.folder, step))
            if self._checkpointer is None:
                self._checkpointer = _open(self.folder, self.config.keep)
            self._saving = self._checkpointer.save_checkpointables_async(
                step, items, force=True, metrics=evaluation, custom_metadata=metadata
            )
        except Exception as error:
            self._saving = _Failed(error)

    def finish(
        self, step: int, state: State, window: list[dict[str, float]], evaluation: dict[str, float] | None = None
    ) -> None:
        """As :meth:`save`, and waits until it is done; tries again for some minutes if the disk is full.

        Raises:
            NotSaved: It did not work.
        """
        for _ in range(ATTEMPTS):
            self.save(step, state, window, evaluation)
            if self._settle():
                return
            time.sleep(PAUSE)
        raise NotSaved(f"step {step} could not be saved in {self.folder}; the checkpoints there are of earlier steps")

    def wait(self) -> bool:
        """Waits for the save under way, if any; False if it failed."""
        return self._settle()

    def close(self) -> None:
        """Waits for the save under way and lets go of everything; also where this process alone has failed."""
        if problem := self._problem():
            _warn(f"the last checkpoint could not be saved: {problem}")
            self._abandon()
        self._forget()
        if jax.process_index() == 0:
            for leftover in self.folder.glob("*.orbax-checkpoint-tmp*"):  # of failed saves
                remove_tree(leftover)
        with contextlib.suppress(OSError):  # the next start tries again
            run_folder.put_back(self.folder)

    def _forget(self):
        """Closes Orbax's checkpointer, which remembers what is in the folder; the next save opens another one."""
        if self._checkpointer is not None:
            self._checkpointer.close()
            self._checkpointer = None

    def _abandon(self):
        """Drops the checkpointer of a save that failed. Closing it would raise the same again."""
        # It may take the save for done and delete an older one in its favour.
        self._checkpointer = None
        # And some of its threads wait, up to 20 minutes, for a word from those that failed.
        command_line.abandon_threads()

    def _saved(self, step):
        """Whether the state after ``step`` is there already: what it holds is decided by the step alone."""
        return bool(largest(jax.process_index() == 0 and (self.folder / str(step)).is_dir()))

    def _settle(self):
        """Waits for the save under way; False if it failed in any process."""
        self._check_at = None
        if self._saving is None:
            return True
        problem = self._problem()
        if not everywhere(problem is None):
            _warn(
                f"the checkpoint could not be saved: {problem or 'another process failed'}. "
                "Training continues from memory, and saving is tried again; earlier checkpoints are untouched"
            )
            self._abandon()
            return False
        together(lambda: run_folder.put_back(self.folder))
        return True

    def _problem(self):
        """Waits for this process's part of the save under way; what went wrong in it, or None."""
        saving, self._saving = self._saving, None
        try:
            if saving is not None:
                saving.result()
        except Exception as error:
            return first_line(error)
        return None

    def _read(self, step, state):
        """What :meth:`restore` gives, of the checkpoint of ``step``, and None; or None, and how it is damaged."""
        folder = self.folder / str(step)
        metadata, problem = run_folder.read(folder, "its metadata", lambda: _metadata(folder))
        if problem:
            return None, problem
        together(lambda: self._require_same_run(metadata))
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), to_items(state))
        items, problem = run_folder.read(folder, "it", lambda: ocp.load_checkpointables(folder, target))
        if problem:
            return None, problem
        if int(self._fingerprint(items)) != metadata["train"]["fingerprint"]:
            return None, "its arrays are not those that were saved (checksum)"
        return (from_items(items, state), metadata["train"]), None

    def _require_same_run(self, metadata):
        # Process 0's word counts: the pictures, on which all have agreed, may lie elsewhere on another host.
        if jax.process_index() == 0:
            require_format(metadata, self.folder)
            run = {"config": self.config, "examples": self._examples, "checksums": self._checksums}
            require_same_run(metadata, self._description, run, self.folder.parent)
        # Those of weights that are gone are lacking.
        self._checksums = metadata["train"].get("checksums", {}) | self._checksums


def _metadata(checkpoint):
    found = stored_metadata(checkpoint)
    found["train"]["config"]  # of a trainer's checkpoint
    found["train"]["fingerprint"]
    return found


class _Failed:
    """A save that failed before it began."""

    def __init__(self, error):
        self.error = error

    def result(self):
        raise self.error


def _open(folder, keep):
    policies = ocp.training.preservation_policies
    return ocp.training.Checkpointer(
        folder,
        preservation_policy=policies.AnyPreservationPolicy(
            [
                policies.LatestN(keep),
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics["top1"], n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        ),
        cleanup_tmp_directories=True,
    )


def _warn(message):
    say(f"WARNING: {message}", sys.stderr)
