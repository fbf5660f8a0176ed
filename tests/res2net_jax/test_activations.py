"""The end of a residual block: relu of a sum, computed once."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from timm.layers import get_act_fn

import res2net_jax
from res2net_jax.activations import ACTIVATIONS, Activation, relu_of_sum
from res2net_jax.backend import compiler_options

pytestmark = pytest.mark.usefixtures("optimized")


def arrays(dtype):
    """Two of them, with equal and opposite values, both zeros, infinities, NaN and the smallest numbers."""
    rng = np.random.default_rng(0)
    special = [0.0, -0.0, 1.5, -1.5, np.inf, np.nan, 1e-45, -1e-45]
    pairs = np.array([(x, y) for x in [*special, -np.inf] for y in special])
    values = np.concatenate([pairs, rng.standard_normal((1000, 2))])
    return (jnp.asarray(values[:, i], dtype) for i in (0, 1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_relu_of_sum_is_that_to_the_bit(dtype):
    x, y = arrays(dtype)
    np.testing.assert_array_equal(*(np.asarray(a, float) for a in (relu_of_sum(x, y), jax.nn.relu(x + y))))


def test_relu_of_sum_does_not_hide_a_shortcut_that_overflowed():
    assert jnp.isnan(relu_of_sum(jnp.ones(1), jnp.full(1, -jnp.inf))).all()


def test_relu_of_sum_and_its_gradients_equal_torch(x64):
    x, y = (values[~jnp.isnan(sum(arrays(jnp.float64)))] for values in arrays(jnp.float64))
    theirs = [torch.tensor(np.array(values), requires_grad=True) for values in (x, y)]
    expected = torch.nn.functional.relu(theirs[0] + theirs[1])
    weights = np.random.default_rng(1).standard_normal(len(x))
    expected.backward(torch.tensor(weights))
    out, pullback = jax.vjp(relu_of_sum, x, y)
    np.testing.assert_array_equal(out, expected.detach().numpy())
    for ours, their in zip(pullback(jnp.asarray(weights)), theirs):
        np.testing.assert_array_equal(ours, their.grad.numpy())
    tangents = jax.jvp(relu_of_sum, (x, y), (jnp.ones_like(x), jnp.asarray(weights)))[1]
    np.testing.assert_array_equal(tangents, (expected.detach().numpy() > 0) * (1 + weights))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_equals_timm(name, x64):
    x = np.linspace(-8, 8, 1001)
    expected = get_act_fn(name)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(Activation(name)(jnp.asarray(x)), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_of_sum_is_the_activation_of_the_sum(name):
    x, y = jnp.linspace(-3, 3, 50), jnp.linspace(1, -2, 50)
    np.testing.assert_array_equal(Activation(name).of_sum(x, y), Activation(name)(x + y))


@pytest.mark.parametrize("program", ["inference", "training"])
def test_each_residual_sum_is_computed_once(program):
    model = res2net_jax.create("res2net50_26w_4s", layers=(1, 1, 6, 1), base_width=4, num_classes=5)
    model.train(program == "training")

    def loss(model, images):
        return jnp.sum(model(images) ** 2)

    run = jax.grad(loss) if program == "training" else loss
    images = jnp.zeros((2, 64, 64, 3))
    text = jax.jit(run, compiler_options=compiler_options()).lower(model, images).compile().as_text()
    # Maps of the third stage are [2, 4, 4, 1024], or as a matrix [32, 1024]; a sum is of two and writes one.
    fusions = re.findall(r"^%fused_computation\S* \((.*?)\) -> f32\[(?:2,4,4|32),1024\] {", text, re.MULTILINE)
    assert fusions
    assert max(len(re.findall(r"f32\[(?:2,4,4|32),1024\]", parameters)) for parameters in fusions) <= 4


@pytest.mark.parametrize("x, y", [(0.0, 0.0), (1.0, -1.0)])
def test_relu_of_sum_has_no_second_derivative_where_it_bends(x, y):
    assert jax.grad(jax.grad(relu_of_sum))(x, y) == 0
