"""Too little memory: an evaluation takes no more images at once than training does, and says which switch helps."""

import dataclasses

import jax
import pytest

from train import imagenet
from train.config import Config

from .conftest import small, steps, train


def test_an_evaluation_takes_as_many_images_as_training_at_once(tmp_path, monkeypatch):
    assert Config(accumulate=4).eval_images == 64
    assert Config(accumulate=4, eval_batch_size=128).eval_images == 128
    sizes, eval_batches = [], imagenet.eval_batches

    def watched(*args, **options):
        sizes.append(options["batch_size"])
        return eval_batches(*args, **options)

    monkeypatch.setattr(imagenet, "eval_batches", watched)
    assert train(small(tmp_path, batch_size=64, accumulate=4)) == 0
    assert sizes == [16]


def test_an_evaluation_without_memory_is_saved_and_done_with_fewer_images(tmp_path, monkeypatch, capsys):
    config = small(tmp_path, steps=3)

    def run_evaluation(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte")

    with monkeypatch.context() as patch:
        patch.setattr(imagenet, "run_evaluation", run_evaluation)
        message = "memory to evaluate 64 images at a time .*1 byte.; the same command with a smaller --eval-batch-size"
        with pytest.raises(ValueError, match=message):
            train(config)
    assert steps(tmp_path / "run") == [3]
    assert train(dataclasses.replace(config, eval_batch_size=8)) == 0
    assert "Resuming at step 3 of 3" in capsys.readouterr().out


def test_a_dry_run_tells_the_memory_of_both_steps(tmp_path, capsys):
    assert train(small(tmp_path, dry_run=True, eval_batch_size=8)) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "MiB a device" in line]
    assert [line.split("  ")[0] for line in told] == ["memory", "to evaluate"]
