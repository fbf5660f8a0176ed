import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch
from timm.models.res2net import Bottle2neck
from timm.models.resnet import ResNet

import porting
import res2net_jax
from res2net_jax import get_variant
from res2net_jax.model import Res2Net
from train.config import Config
from train.step import (
    evaluated,
    fingerprint,
    init_state,
    make_eval_step,
    make_forward,
    make_train_step,
    split,
    zero_sums,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = {"layers": (1, 2, 1, 1), "channels": (16, 16, 32, 32), "scale": 3}
CLASSES = 7


def small_torch():
    model = ResNet(
        Bottle2neck,
        SMALL["layers"],
        channels=SMALL["channels"],
        base_width=26,
        block_args={"scale": SMALL["scale"]},
        num_classes=CLASSES,
    )
    return model.double().train()


def ours(reference, **arch):
    classes = reference.num_classes
    model = res2net_jax.create("res2net50_26w_4s", num_classes=classes, param_dtype=jnp.float64, **arch)
    return porting.load_state_dict(model, {key: value.numpy() for key, value in reference.state_dict().items()})


def batches(count, size, *, side=32, classes=CLASSES, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield {
            "image": rng.integers(0, 256, (size, side, side, 3), np.uint8),
            "label": rng.integers(0, classes, size).astype(np.int32),
            "stop": np.zeros(1, np.int32),
        }


def test_the_fingerprint_is_of_all_bits_and_their_places():
    a, b = jnp.arange(6.0), jnp.arange(6.0) + 7
    flipped = jax.lax.bitcast_convert_type(a, jnp.uint32).at[3].add(1)
    trees = [
        {"a": a, "b": b},
        {"a": a[::-1], "b": b},
        {"a": a[jnp.array([1, 0, 2, 3, 4, 5])], "b": b},
        {"a": b, "b": a},
        {"a": jax.lax.bitcast_convert_type(flipped, jnp.float32), "b": b},
    ]
    assert len({int(fingerprint(tree)) for tree in trees}) == len(trees)


def test_any_flipped_bit_changes_the_fingerprint():
    bits = np.random.default_rng(0).integers(0, 2**32, (6, 32), np.uint32)
    flipped = np.repeat(bits[None], bits.size * 32, 0).reshape(-1, bits.size)
    flips = np.arange(len(flipped))
    flipped[flips, flips // 32] ^= np.uint32(1) << (flips % 32).astype(np.uint32)
    found = jax.vmap(fingerprint)({"a": flipped[:, :100], "b": flipped[:, 100:]})
    assert int(fingerprint({"a": bits.ravel()[:100], "b": bits.ravel()[100:]})) not in np.asarray(found)


def test_what_makes_a_step_leaves_the_model_as_it_is():
    model = res2net_jax.create("res2net50_26w_4s", layers=(1,), channels=(8,))
    config = Config(batchnorm_group=2, remat=True)
    for is_training in (True, False):
        model.train(is_training)
        make_train_step(model, config, 1, MEAN, STD), make_eval_step(model, config, MEAN, STD)
        assert model.bn1.use_running_average == (not is_training)
        assert model.bn1.group_size is None and not model.grad_checkpointing


def normalised(images):
    return (torch.from_numpy(images.transpose(0, 3, 1, 2)).double() / 255 - tensor(MEAN)) / tensor(STD)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)[:, None, None]


def run(model, config, data, steps_per_epoch=100):
    step = jax.jit(make_train_step(model, config, steps_per_epoch, MEAN, STD))
    state = init_state(model, config)
    history = []
    for batch in data:
        state, metrics = step(state, batch)
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


def worst(state, reference):
    """Largest difference of a parameter or running statistic from torch's."""
    there = ours(reference, **SMALL) if reference.num_classes == CLASSES else ours(reference)
    params, stats = split(there)
    differences = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), (state["params"], state["stats"]), (params, stats)
    )
    return max(jax.tree.leaves(differences))


def torch_steps(reference, config, data, steps_per_epoch, groups=1):
    optimizer = torch.optim.SGD(
        reference.parameters(),
        lr=config.peak_lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, config.decay_epochs, 0.1)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    for number, batch in enumerate(data, start=1):
        optimizer.zero_grad()
        parts = normalised(batch["image"]).chunk(groups)
        criterion(forward_in_groups(reference, parts), torch.from_numpy(batch["label"]).long()).backward()
        if config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(reference.parameters(), config.clip_norm)
        optimizer.step()
        if number % steps_per_epoch == 0:
            scheduler.step()


def forward_in_groups(reference, parts):
    """torch.nn.DataParallel's arithmetic: each part by itself, the first one's running statistics stay."""
    logits = [reference(parts[0])]
    statistics = {name: buffer.clone() for name, buffer in reference.named_buffers()}
    logits += [reference(part) for part in parts[1:]]
    for name, buffer in reference.named_buffers():
        buffer.data = statistics[name]
    return torch.cat(logits)


PAPER = Config(batch_size=256, decay_epochs=1, epochs=3)


@pytest.mark.parametrize(
    "changes",
    [{}, {"nesterov": True, "clip_norm": 0.5, "label_smoothing": 0.0, "weight_decay": 0.0, "remat": True}],
    ids=["paper", "other-switches"],
)
def test_ten_steps_equal_torch_sgd(x64, changes):
    config = dataclasses.replace(PAPER, dtype="float64", **changes)
    torch.manual_seed(0)
    reference = small_torch()
    model = ours(reference, **SMALL)
    state, history = run(model, config, batches(10, 8), steps_per_epoch=6)
    torch_steps(reference, config, batches(10, 8), steps_per_epoch=6)
    assert [round(metrics["lr"], 12) for metrics in history] == [0.1] * 6 + [0.01] * 4
    assert worst(state, reference) < 1e-10


@pytest.mark.soak
def test_ten_steps_of_the_whole_model_equal_torch_sgd(x64):
    config = dataclasses.replace(PAPER, dtype="float64")
    torch.manual_seed(0)
    reference = timm.create_model("res2net50_26w_4s", num_classes=CLASSES + 1).double().train()
    state, _ = run(ours(reference), config, batches(10, 8, side=64), steps_per_epoch=6)
    torch_steps(reference, config, batches(10, 8, side=64), steps_per_epoch=6)
    difference = worst(state, reference)
    print(f"largest difference after ten steps: {difference:.1e}")
    assert difference < 1e-10


def test_grouped_batch_norm_equals_torch_on_the_same_groups(x64):
    config = dataclasses.replace(PAPER, dtype="float64", batchnorm_group=4)
    torch.manual_seed(0)
    reference = small_torch()
    model = ours(reference, **SMALL)
    state, _ = run(model, config, batches(3, 12))
    torch_steps(reference, config, batches(3, 12), 100, groups=3)
    assert worst(state, reference) < 1e-10


def test_accumulation_is_the_mean_over_parts_that_pass_the_statistics_on(x64):
    config = dataclasses.replace(PAPER, dtype="float64", accumulate=2)
    torch.manual_seed(0)
    reference = small_torch()
    state, _ = run(ours(reference, **SMALL), config, batches(3, 8))
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    for batch in batches(3, 8):
        optimizer.zero_grad()
        for part in range(2):
            images, labels = normalised(batch["image"][part::2]), torch.from_numpy(batch["label"][part::2]).long()
            (criterion(reference(images), labels) / 2).backward()
        optimizer.step()
    assert worst(state, reference) < 1e-10


def test_rematerialisation_keeps_a_third_for_the_backward_pass():
    model = Res2Net(get_variant("res2net50_26w_4s").arch)
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)

    def kept(remat):
        forward = make_forward(model, Config(batch_size=64, remat=remat), training=True)

        def backward(params, stats, images):
            return jax.vjp(lambda params: forward(params, stats, images)[0], params)[1]

        residuals = jax.tree.leaves(jax.eval_shape(backward, *split(model), images))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in residuals)

    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(split(model)))
    assert kept(remat=True) - weights < (kept(remat=False) - weights) / 3


def test_evaluation_asks_for_whole_float32_products():
    model = res2net_jax.create("res2net50_26w_4s", num_classes=CLASSES, **SMALL)
    (batch,) = batches(1, 8)
    step = make_eval_step(model, PAPER, MEAN, STD)
    weights = evaluated(init_state(model, PAPER))
    program = str(jax.make_jaxpr(step)(weights, batch | {"mask": np.ones(8, bool)}, zero_sums(PAPER)))
    products = program.count("conv_general_dilated[") + program.count("dot_general[")
    assert products > 10 and program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products
