"""What training drops: by each layer alone, and where in a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from timm.layers.drop import drop_block_2d

import res2net_jax
from res2net_jax.drop import DropBlock, Dropout, DropPath

# The rate of one drop -> the smallest model in which it drops something.
SMALLEST = {
    "drop_rate": {"layers": (1,), "channels": (8,)},
    "drop_path_rate": {"layers": (2,), "channels": (8,)},
    "drop_block_rate": {"layers": (1, 1, 2), "channels": (8, 8, 8)},
}
run = jax.jit(lambda module, x, key=None: module(x, key))


def small_model(drop, rate):
    """In train mode, with no other drop than this."""
    options = SMALLEST[drop] | {drop: rate, "num_classes": 5, "zero_init_last": False}
    return res2net_jax.create("res2net50_26w_4s", **options)


def numbers(*shape):
    """From 1 to 2."""
    return jnp.asarray(np.random.default_rng(0).uniform(1, 2, shape))


@pytest.mark.parametrize("drop", SMALLEST)
def test_a_model_that_drops_needs_a_key(drop):
    with pytest.raises(ValueError, match="at rate 0.3 needs a random key"):
        jax.eval_shape(run, small_model(drop, 0.3), numbers(2, 32, 32, 3))


@pytest.mark.parametrize("drop", SMALLEST)
def test_the_key_says_what_is_dropped(drop):
    model, images = small_model(drop, 0.3), numbers(8, 64, 64, 3)
    first, again, other = (run(model, images, jax.random.key(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.allclose(first, other)


def test_nothing_is_dropped_in_eval_mode():
    rates = dict.fromkeys(SMALLEST, 0.3)
    model = res2net_jax.create("res2net50_26w_4s", **SMALLEST["drop_block_rate"], **rates).eval()
    block, x = model.layer3[1], numbers(2, 4, 4, 3)
    for drop in (model.head_drop, block.drop_path, block.drop_block):
        assert drop.rate and drop(x, jax.random.key(0)) is drop(x, None) is x


def test_the_classifier_sees_what_dropout_leaves():
    model, maps, key = small_model("drop_rate", 0.25), numbers(4, 3, 3, 32), jax.random.key(0)
    left = np.asarray(model.forward_head(maps, pre_logits=True, key=key))
    kept = left != 0
    assert 0 < kept.mean() < 1
    np.testing.assert_allclose(left, kept * maps.mean((1, 2)) / 0.75, rtol=1e-6)
    expected = left @ model.fc.kernel[...] + model.fc.bias[...]
    np.testing.assert_allclose(model.forward_head(maps, key=key), expected, rtol=1e-5, atol=1e-5)


def added(block, x, key=None):
    """What ``block`` adds to its shortcut ``x``: so little that no sum is below 0, where the activation would cut."""
    block.bn3.scale.set_value(jnp.full_like(block.bn3.scale.get_value(), 0.01))
    return np.asarray(run(block, x, key) - x)


def test_an_image_that_drop_path_drops_is_its_shortcut(x64):
    block, x = small_model("drop_path_rate", 0.25).eval().layer1[1], numbers(16, 4, 4, 32)
    branch = added(block, x)
    block.drop_path.deterministic = False
    left = added(block, x, jax.random.key(0))
    kept = left.any((1, 2, 3), keepdims=True)
    assert 0 < kept.mean() < 1
    np.testing.assert_allclose(left, kept * branch / 0.75, rtol=0, atol=1e-12)


def test_a_pixel_that_drop_block_drops_is_its_shortcut(x64):
    """For what is dropped are the values of all channels, before a convolution of single pixels."""
    block, x = small_model("drop_block_rate", 0.3).eval().layer3[1], numbers(8, 8, 8, 32)
    branch = added(block, x)
    block.drop_block.deterministic = False
    left = added(block, x, jax.random.key(0))
    kept = left.any(3, keepdims=True)
    assert 0 < kept.mean() < 1
    np.testing.assert_allclose(left, kept * branch / kept.mean(), rtol=1e-6, atol=1e-12)


def test_each_block_draws_for_itself():
    """Two blocks add 1 and 2 to maps of zeros, at a rate of a half doubled: the sum says which of them were kept."""
    model = res2net_jax.create("res2net50_26w_4s", layers=(3,), channels=(8,), drop_path_rate=0.5)
    first, *others = model.layer1
    first.downsample[1].scale.set_value(jnp.zeros(32))
    for number, block in enumerate(others, start=1):
        block.drop_path.rate = 0.5
        block.bn3.bias.set_value(jnp.full(32, float(number)))  # the scale of a fresh one is 0
    forward = jax.jit(lambda model, x, key: model.forward_features(x, key))
    maps = forward(model, numbers(32, 16, 16, 3), jax.random.key(0))
    assert set(np.unique(maps)) == {0, 2, 4, 6}


def test_dropout_and_drop_path_keep_the_mean():
    x = jnp.ones((4000, 1, 1, 8))
    out = np.asarray(DropPath(0.3)(x, jax.random.key(0)))
    assert set(np.unique(out)) == {0, np.float32(1 / 0.7)} and (out == out[..., :1]).all()
    assert out.mean() == pytest.approx(1, abs=5 * np.sqrt(0.3 / 0.7 / 4000))
    out = np.asarray(Dropout(0.3)(x, jax.random.key(0)))
    assert not (out == out[..., :1]).all()
    assert out.mean() == pytest.approx(1, abs=5 * np.sqrt(0.3 / 0.7 / 32000))


@pytest.mark.parametrize(("block_size", "size"), [(3, 14), (5, 14), (5, 4), (3, 2), (7, 20)])
def test_drop_block_drops_what_timm_drops(block_size, size, monkeypatch):
    """With the same seeds, the same squares and the same scale."""
    seeds = np.random.default_rng(block_size).uniform(size=(16, size, size)) < 0.03
    monkeypatch.setattr(torch.Tensor, "bernoulli_", lambda self, p: self.copy_(torch.from_numpy(seeds[:, None])))
    expected = drop_block_2d(torch.ones(16, 3, size, size), 0.1, block_size, 0.25).numpy().transpose(0, 2, 3, 1)
    probabilities = []

    def bernoulli(key, p, shape):
        probabilities.append(p)
        return jnp.asarray(seeds[..., None])

    monkeypatch.setattr(jax.random, "bernoulli", bernoulli)
    drop = DropBlock(0.1, block_size=block_size, gamma_scale=0.25)
    assert np.allclose(drop(jnp.ones((16, size, size, 3)), jax.random.key(0)), expected, rtol=1e-6)
    window = min(block_size, size)
    assert probabilities == [pytest.approx(0.25 * 0.1 * size**2 / window**2 / (size - window + 1) ** 2)]


def test_drop_block_drops_its_share():
    drop = DropBlock(0.1, block_size=3, gamma_scale=1.0)
    out = np.asarray(drop(jnp.ones((200, 28, 28, 1)), jax.random.key(0)))
    assert (out == 0).mean() == pytest.approx(0.1, abs=0.02)
    assert out.mean() == pytest.approx(1, abs=1e-4)
