"""A batch in turns against the whole of it, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import res2net_jax
from res2net_jax import microbatch
from res2net_jax.fusion import compile_function
from res2net_jax.microbatch import in_turns, on_one_core, whole


@pytest.fixture(autouse=True)
def few_values(monkeypatch):
    """At once 48 on each of two cores."""
    monkeypatch.setattr(microbatch, "VALUES", 48)
    monkeypatch.setattr(microbatch, "cores", lambda: 2)


def sizes(over_batch, batch, values):
    """Of the batches that a stage is given; traced once, whatever the number of turns."""
    seen = []

    def stage(x):
        seen.append(len(x))
        return x

    over_batch(stage, jnp.zeros((batch, 2, 2, 1)), values)
    return seen


@pytest.mark.parametrize(
    ("batch", "values", "size"),
    [
        (8, 1000, 1),  # more than there should be, but an image is the least
        (8, 32, 2),  # three would do, but do not divide eight
        (9, 32, 3),
        (8, 24, 4),
        (10, 24, 2),  # four do not divide ten, two are half of it
        (7, 24, 7),  # one is less
        (7, 48, 1),
        (4, 24, 4),
        (3, 24, 3),
        (0, 24, 0),
    ],
)
def test_as_many_images_at_once_as_stay_in_the_caches(batch, values, size):
    assert sizes(in_turns, batch, values) == [size]
    assert sizes(whole, batch, values) == [batch]


def test_half_as_many_for_one_core():
    assert sizes(on_one_core, 8, 24) == [2]


def test_only_on_a_cpu_alone(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)  # the images may be sharded
    assert sizes(in_turns, 8, 32) == [8]
    monkeypatch.undo()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert sizes(in_turns, 8, 10**9) == [8]


def test_a_compiled_model_takes_turns_and_computes_the_same(x64, monkeypatch):
    monkeypatch.setattr(microbatch, "VALUES", 4224)
    model = res2net_jax.create(
        "res2net50_26w_4s", layers=(2, 1), channels=(16, 32), zero_init_last=False, param_dtype="float64"
    ).eval()
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 33, 64, 3)))
    plain, run = jax.jit(lambda model, x: model(x)), res2net_jax.compile(model)
    # The stem and the first stage an image at a time; the second, with about half as many values, two.
    assert str(jax.make_jaxpr(run)(x)).count("scan[") == 3
    expected, gradient = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(plain(model, x))))(x)
    ours, our_gradient = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(run(x))))(x)
    logits = plain(model, x)
    assert np.abs(run(x) - logits).max() < 1e-13 * np.abs(logits).max()
    assert abs(ours - expected) < 1e-12 * abs(expected)
    assert np.abs(our_gradient - gradient).max() < 1e-12 * np.abs(gradient).max()
    assert str(jax.make_jaxpr(model)(x)).count("scan[") == 0


def test_every_stage_of_a_compiled_backbone(x64):
    model = res2net_jax.create(
        "res2net50_26w_4s", layers=(1, 1), channels=(16, 32), zero_init_last=False, param_dtype="float64"
    ).eval()
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 32, 32, 3)))

    def features(model, x):
        return model.forward_intermediates(x)

    last, stages = compile_function(features, model)(x)
    expected, their_stages = jax.jit(features)(model, x)
    for ours, plain in zip([last, *stages], [expected, *their_stages], strict=True):
        assert np.abs(ours - plain).max() < 1e-13 * np.abs(plain).max()
