"""What our runners compute, beside timm's; how long it takes is for no test."""

from unittest import mock

import jax
import numpy as np
import pytest
import torch
from beside_torch import difference, nchw
from flax import nnx

import porting.twin
import res2net_jax
from benchmarks import ours, torch_peer

IMAGES = np.random.default_rng(0).standard_normal((4, 32, 32, 3)).astype("float32")
LABELS = np.arange(4)


@pytest.fixture
def models(monkeypatch):
    """A small model and timm's twin of it, which the runners now run on ``IMAGES``."""
    options = {"layers": (2,), "channels": (16,), "scale": 2, "num_classes": 5, "zero_init_last": False}
    model = res2net_jax.create("res2net50_26w_4s", **options)
    reference = porting.twin.timm_model(model)
    monkeypatch.setattr(ours, "create", lambda name: model)
    monkeypatch.setattr(torch_peer.timm, "create_model", lambda name, **options: reference)
    for runners in (ours, torch_peer):
        monkeypatch.setattr(runners, "images_and_labels", lambda batch: (IMAGES, LABELS))
    return model, reference


def test_inference_gives_the_logits(models):
    with torch.inference_mode():
        expected = models[1].eval()(nchw(IMAGES))
    assert difference(ours.inference("m", 4)(), expected) < 1e-5


def test_training_is_that_of_timm(models, monkeypatch):
    """Twice, for the momentum; at rates that show in float32."""
    model, reference = models
    before = {key: value.copy() for key, value in porting.state_dict(model).items()}
    for runners in (ours, torch_peer):
        monkeypatch.setattr(runners, "LR", 0.1)
        monkeypatch.setattr(runners, "WEIGHT_DECAY", 0.1)
    made = ours.train_step("m", 4)
    monkeypatch.setattr(ours, "train_step", lambda name, batch: made)
    for run in (ours.train("m", 4), torch_peer.train("m", 4, "eager")):
        run()
        run()
    for kind, leaves in zip((nnx.Param, nnx.BatchStat), made[1]):
        nnx.update(model, jax.tree.unflatten(jax.tree.structure(nnx.state(model, kind)), leaves))
    after = porting.state_dict(model)
    # The twin has four stages, within the first of which is ours.
    expected = {key.replace("layer1.0", "layer1", 1): value for key, value in reference.state_dict().items()}
    for key in before:
        change = expected[key].numpy() - before[key]
        assert np.abs(after[key] - before[key] - change).max() < 1e-3 * np.abs(change).max(), key


@pytest.mark.parametrize("task", ["inference", "train"])
def test_a_run_ends_when_its_result_is_there(task, monkeypatch):
    result = mock.Mock()
    monkeypatch.setattr(ours, "create", mock.Mock())
    monkeypatch.setattr(res2net_jax, "compile", lambda model: lambda images: result)
    monkeypatch.setattr(ours, "train_step", lambda *given: (lambda *state: (*state, result), [], ()))
    getattr(ours, task)("m", 1)()
    result.block_until_ready.assert_called_once_with()
