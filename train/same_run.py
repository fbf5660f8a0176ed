"""Whether a command continues the run that a checkpoint is of, and what differs if it does not."""

import json
import reprlib
from pathlib import Path
from typing import Any

from train.config import Config, to_json

#: The checksum by which a folder of pictures is known elsewhere. In its place a picture may be replaced or taken out.
FOLDER = "checksum of the folder of pictures"

#: Fields that may change between the runs of one training: none of them changes a parameter's bits.
FREE = {
    *(
        "data_dir",
        "workers",
        "output",
        "eval_batch_size",
        "eval_every",
        "checkpoint_every",
        "keep",
        "log_every",
        "steps",
    ),
    *("coordinator", "num_processes", "process_id", "dry_run", "fake_data"),
}


def require_same_run(saved: dict[str, Any], description: dict[str, Any], run: dict[str, Any], folder: Path) -> None:
    """ValueError that names what differs, unless ``saved`` is of the run that is to go on.

    Args:
        saved: A checkpoint's metadata.
        description: The model, as :func:`res2net_jax.metadata.describe` gives it.
        run: The ``config``, the number of ``examples`` and the ``checksums`` (:func:`train.start.checksums`).
        folder: Of the run, for the message.
    """
    theirs = saved["train"]
    config, dataset = dict(theirs["config"]), run["config"].dataset
    sums = theirs.get("checksums", {})
    if FOLDER in sums and sums[FOLDER] == run["checksums"].get(FOLDER):
        config["dataset"] = dataset
    if lines := differences(config, run["config"]):
        reason = "with another config; give another --output, or the same values"
        if all(line.startswith("epochs:") for line in lines):  # on which the whole schedule depends
            reason += f". To train its weights further: --pretrained --model {folder} --output ANOTHER"
    else:
        reason = "of the same config, but on other data or from other weights; put them back, or give another --output"
        lines = _differing(_facts(saved, theirs.get("examples")), _facts(description, run["examples"]))
        # Earlier versions kept no checksums, and weights that are gone have none.
        ours = {name: value for name, value in run["checksums"].items() if name != FOLDER}
        lines = lines or _differing({**ours, **sums}, ours)
    if lines:
        raise ValueError(f"{folder} holds a run {reason}:\n  " + "\n  ".join(lines))


def differences(saved: dict, config: Config) -> list[str]:
    """One line for each field in which ``config`` would not continue the run that ``saved`` (its JSON) began.

    A field that is younger than the run counts as it is by default, which is how the run was trained.
    """
    ours, saved = _flat(to_json(config)), {**_flat(to_json(Config())), **_flat(saved)}
    names = [name for name in saved if name not in FREE and saved[name] != ours.get(name)]
    return [f"{name}: the run has {saved.get(name)!r}, this command {ours.get(name)!r}" for name in names]


def _flat(fields):
    """With the augmentation's fields among the others, as on the command line."""
    return {**fields, **fields["augment"], "augment": None}


def _facts(metadata, examples):
    """What the data set and the initial weights decide, beside the config."""
    facts = json.loads(json.dumps({**metadata["model"], "preprocessing": metadata["preprocessing"]}))
    return {**facts.pop("arch"), **facts, "examples": examples}


def _differing(saved, ours):
    return [
        f"{name}: the run has {reprlib.repr(saved.get(name))}, now there is {reprlib.repr(ours[name])}"
        for name in ours
        if saved.get(name) != ours[name]
    ]
