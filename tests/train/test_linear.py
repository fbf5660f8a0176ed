"""Steps of a linear model, which torch can follow, and whose statistics tell what reached it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from train.config import Config
from train.step import evaluated, init_state, make_eval_step, make_train_step, zero_sums

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SIZE, SIDE, CLASSES = 6, 8, 4
RNG = np.random.default_rng(0)
BATCH = {
    "image": RNG.integers(0, 256, (SIZE, SIDE, SIDE, 3), np.uint8),
    "label": np.array([0, 1, 2, 3, 1, 2], np.int32),
    "stop": np.zeros(1, np.int32),
}
PIXELS = (BATCH["image"] / 255 - MEAN) / STD
KERNEL = RNG.normal(0, 0.1, (SIDE * SIDE * 3, CLASSES))


@pytest.fixture(autouse=True)
def in_float64(x64):
    """So that differences are mistakes."""


class Linear(nnx.Module):
    """Logits; it keeps the pictures that it saw in training, and a number that it drew with its key."""

    num_classes = CLASSES

    def __init__(self):
        self.kernel, self.bias = nnx.Param(jnp.asarray(KERNEL)), nnx.Param(jnp.zeros(CLASSES))
        self.seen, self.drawn = nnx.BatchStat(jnp.zeros(PIXELS.shape)), nnx.BatchStat(jnp.zeros(()))
        self.group_size = self.use_running_average = None

    def __call__(self, images, key):
        if key is not None:
            self.seen.set_value(images)
            self.drawn.set_value(jax.random.uniform(key))
        return images.reshape(len(images), -1) @ self.kernel[...] + self.bias[...]

    def train(self, mode):
        return self

    def set_grad_checkpointing(self, enable):
        pass


class Step(NamedTuple):
    before: dict
    after: dict
    metrics: dict

    @property
    def seen(self):
        return np.asarray(self.after["stats"]["seen"])

    @property
    def logits(self):
        kernel, bias = (np.asarray(self.before["params"][name]) for name in ("kernel", "bias"))
        return self.seen.reshape(SIZE, -1) @ kernel + bias


def steps(count=3, **switches):
    """So many of them on one batch; what differs between two is drawn or learned."""
    config, model = Config(dtype="float64", **switches), Linear()
    step, state = jax.jit(make_train_step(model, config, 100, MEAN, STD)), init_state(model, config)
    for _ in range(count):
        before = state
        state, metrics = step(before, BATCH)
        yield Step(before, state, {name: float(value) for name, value in metrics.items()})


def cross_entropy(logits, labels, smoothing=0.1, **options):
    logits, labels = torch.from_numpy(np.array(logits)), torch.from_numpy(np.array(labels)).long()
    return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing, **options).item()


def of_both(share, logits):
    """The loss of two pictures laid over each other, as in mixup's and CutMix's own code."""
    labels = BATCH["label"]
    return share * cross_entropy(logits, labels) + (1 - share) * cross_entropy(logits, labels[::-1])


def test_mixup_alone():
    shares = []
    for step in steps(mixup=1.0):
        other = PIXELS[::-1]
        share = np.vdot(step.seen - other, PIXELS - other) / np.vdot(PIXELS - other, PIXELS - other)
        np.testing.assert_allclose(step.seen, share * PIXELS + (1 - share) * other, atol=1e-12)
        assert step.metrics["loss"] == pytest.approx(of_both(share, step.logits), rel=1e-12)
        heavier = BATCH["label"][:: 1 if share > 0.5 else -1]
        assert step.metrics["top1"] == pytest.approx(np.mean(step.logits.argmax(-1) == heavier))
        shares.append(share)
    assert len({round(share, 6) for share in shares}) == 3 and all(0 < share < 1 for share in shares)


def test_cutmix_alone():
    shares = []
    for step in steps(cutmix=1.0):
        kept = np.isclose(step.seen, PIXELS).all((0, 3))
        np.testing.assert_allclose(step.seen, np.where(kept[:, :, None], PIXELS, PIXELS[::-1]), atol=1e-12)
        assert step.metrics["loss"] == pytest.approx(of_both(kept.mean(), step.logits), rel=1e-12)
        shares.append(kept.mean())
    assert len(set(shares)) == 3


def test_random_erasing():
    masks = []
    for step in steps(random_erasing=0.5):
        erased = ~np.isclose(step.seen, PIXELS).all(-1)
        np.testing.assert_allclose(step.seen, np.where(erased[..., None], 0, PIXELS), atol=1e-12)
        assert step.metrics["loss"] == pytest.approx(cross_entropy(step.logits, BATCH["label"]), rel=1e-12)
        masks.append(erased)
    some = np.any(masks, (2, 3))
    assert some.any() and not some.all()
    assert not np.array_equal(masks[0], masks[1]) and not np.array_equal(masks[1], masks[2])


def test_the_model_draws_anew_at_each_step_and_for_each_seed():
    drawn = [float(step.after["stats"]["drawn"]) for seed in (0, 1) for step in steps(seed=seed)]
    assert len(set(drawn)) == 6


def test_the_average_follows_the_weights_faster_at_first():
    average = KERNEL
    for decay, step in zip((1 / 10, 2 / 11, 0.2), steps(ema=0.2)):  # 3 / 12 would be more than was asked for
        average = decay * average + (1 - decay) * step.after["params"]["kernel"]
        np.testing.assert_allclose(step.after["ema"]["kernel"], average, rtol=1e-12)


@pytest.mark.parametrize(
    "switches",
    [
        {"clip_norm": 0.5, "weight_decay": 0.1},
        {"decay_all": False, "weight_decay": 0.1},
        {"momentum": 0.0, "label_smoothing": 0.3},
    ],
    ids=lambda switches: "-".join(switches),
)
def test_what_is_learned_is_what_torch_learns(switches):
    config = Config(**switches)
    kernel, bias = (torch.from_numpy(array.copy()).requires_grad_() for array in (KERNEL, np.zeros(CLASSES)))
    groups = [{"params": [kernel]}, {"params": [bias]} if config.decay_all else {"params": [bias], "weight_decay": 0}]
    sgd = torch.optim.SGD(groups, lr=0.1, momentum=config.momentum, weight_decay=config.weight_decay)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    for step in steps(**switches):
        sgd.zero_grad()
        logits = torch.from_numpy(PIXELS).reshape(SIZE, -1) @ kernel + bias
        loss = criterion(logits, torch.from_numpy(BATCH["label"]).long())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([kernel, bias], config.clip_norm or np.inf)
        sgd.step()
        found = step.metrics["loss"], step.metrics["grad_norm"]
        assert found == pytest.approx((loss.item(), norm.item()), rel=1e-12)
        for name, expected in (("kernel", kernel), ("bias", bias)):
            np.testing.assert_allclose(step.after["params"][name], expected.detach(), rtol=1e-10, atol=1e-14)


def test_the_top1_of_a_step_is_the_share_of_right_answers():
    shares = [np.mean(step.logits.argmax(-1) == BATCH["label"]) for step in steps()]
    assert [step.metrics["top1"] for step in steps()] == pytest.approx(shares)
    assert len(set(shares)) > 1


def evaluation(class_subset=None, **batch):
    config, model = Config(dtype="float64"), Linear()
    step = jax.jit(make_eval_step(model, config, MEAN, STD, class_subset))
    weights, sums = evaluated(init_state(model, config)), zero_sums(config)
    for _ in range(2):
        sums, answers = step(weights, {**BATCH, "mask": np.ones(SIZE, bool), **batch}, sums)
    return sums, answers


LOGITS = PIXELS.reshape(SIZE, -1) @ KERNEL


def test_padding_adds_to_no_sum_of_an_evaluation():
    mask = np.arange(SIZE) < 4
    sums, _ = evaluation(mask=mask, label=np.where(mask, BATCH["label"], -1))
    right = np.sum(LOGITS.argmax(-1)[:4] == BATCH["label"][:4])
    assert {name: int(sums[name]) for name in ("count", "top1", "top5")} == {"count": 8, "top1": 2 * right, "top5": 8}
    loss = cross_entropy(LOGITS[:4], BATCH["label"][:4], smoothing=0, reduction="sum")
    assert float(sums["loss"]) == pytest.approx(2 * loss, rel=1e-12)


def test_answers_are_among_the_classes_of_the_data_set():
    sums, answers = evaluation(class_subset=(1, 3))
    chosen = np.array([1, 3])[LOGITS[:, [1, 3]].argmax(-1)]
    assert np.array_equal(answers["prediction"], chosen) and not np.array_equal(chosen, LOGITS.argmax(-1))
    assert int(sums["top1"]) == 2 * np.sum(chosen == BATCH["label"]) > 0
    among = torch.softmax(torch.from_numpy(LOGITS[:, [1, 3]]), -1).numpy()
    np.testing.assert_allclose(answers["probability"], among.max(-1), rtol=1e-12)
