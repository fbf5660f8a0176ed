"""Norms, pools and convolutions beside torch's."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from beside_torch import difference, images, nchw
from flax import nnx
from timm.layers import SelectAdaptivePool2d

import res2net_jax
from res2net_jax.layers import BatchNorm, Conv
from res2net_jax.pooling import ANTI_ALIASING, AvgPool, global_pool, max_pool


def test_batch_norm_keeps_its_precision_far_from_zero(optimized):
    x = (images((4, 8, 8, 3), "float64") + 1e4).astype("float32").astype("float64")
    theirs = torch.nn.BatchNorm2d(3).double()
    expected = theirs(nchw(x))
    ours = BatchNorm(3, param_dtype="float32")
    for leaf, value in zip((ours.scale, ours.bias, ours.mean, ours.var), (1, 0, 0, 1)):
        leaf.set_value(jnp.full(3, value, "float32"))
    # float32 knows a mean near 1e4 to about 1e-3; E[x^2] - E[x]^2 would know the variance to about 10.
    assert difference(ours(jnp.asarray(x, "float32")), expected) < 2e-3
    assert np.allclose(ours.var[...], theirs.running_var, rtol=1e-3)


def test_batch_norm_has_second_derivatives(x64):
    x, direction, weight = images((3, 3, 4, 4, 5), "float64")

    def loss(x):
        layer = BatchNorm(5, param_dtype="float64")
        for leaf, value in zip((layer.scale, layer.bias, layer.mean, layer.var), (2, 1, 0, 1)):
            leaf.set_value(jnp.full(5, value, "float64"))
        return jnp.sum(jnp.tanh(layer(x)) * weight)

    theirs = torch.nn.BatchNorm2d(5).double()
    torch.nn.init.constant_(theirs.weight, 2)
    torch.nn.init.constant_(theirs.bias, 1)
    y = nchw(x).requires_grad_()
    (gradient,) = torch.autograd.grad((theirs(y).tanh() * nchw(weight)).sum(), y, create_graph=True)
    (expected,) = torch.autograd.grad((gradient * nchw(direction)).sum(), y)
    _, ours = jax.jvp(jax.grad(loss), (jnp.asarray(x),), (jnp.asarray(direction),))
    assert difference(ours, expected) < 1e-12


def test_the_gradient_of_batch_norm_takes_two_sums():
    layer = BatchNorm(5, param_dtype="float32")

    @jax.jit
    def gradients(x, scale, bias, weight):
        def run(x, scale, bias):
            twin = nnx.clone(layer)
            for leaf, value in zip((twin.scale, twin.bias, twin.mean, twin.var), (scale, bias, bias, scale)):
                leaf.set_value(value)
            return twin(x)

        return jax.vjp(run, x, scale, bias)[1](weight)

    x, weight = jnp.asarray(images((2, 3, 4, 4, 5), "float32"))
    program = gradients.lower(x, jnp.ones(5), jnp.zeros(5), weight).compile().as_text()
    # Of the output's gradient, alone and times the normalised input: the gradients of bias and scale, and what the
    # input's needs. The other two are the batch's mean and variance.
    assert len(re.findall(r"= f32\[\S+ reduce\(", program)) == 4


def test_batch_norm_of_one_value_says_so():
    model = res2net_jax.create("res2net50_26w_4s", layers=(1,), channels=(16,))
    norm = model.bn1
    with pytest.raises(ValueError, match="more than one value per channel"):
        norm(jnp.ones((1, 1, 1, 64)))
    with pytest.raises(ValueError, match="needs images; got a batch of none"):
        norm(jnp.ones((0, 8, 8, 64)))


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (5, 6)])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (max_pool, torch.nn.MaxPool2d(3, 2, 1)),
        (AvgPool(3, 2, padding=(1, 1)), torch.nn.AvgPool2d(3, 2, 1)),
        (AvgPool(3, 1, padding=(1, 1)), torch.nn.AvgPool2d(3, 1, 1)),
        (AvgPool(2, 2, ceil_mode=True), torch.nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)),
    ],
    ids=["max", "avg3 stride 2", "avg3 stride 1", "avg2 ceil"],
)
def test_pools_equal_torch(ours, theirs, size, x64):
    x = images((2, *size, 3), "float64")
    assert difference(ours(jnp.asarray(x)), theirs(nchw(x))) < 1e-15


@pytest.mark.parametrize("kind", ["avg", "max", "avgmax", "catavgmax"])
def test_the_last_pool_and_its_gradient_equal_timm(kind, x64):
    x = np.random.default_rng(0).integers(0, 4, (2, 4, 5, 8)).astype("float64")  # many of equal value
    theirs = nchw(x).requires_grad_()
    expected = SelectAdaptivePool2d(pool_type=kind, flatten=True)(theirs)
    weights = images(expected.shape, "float64")
    (expected * torch.from_numpy(weights)).sum().backward()
    pooled, pull_back = jax.vjp(lambda x: global_pool(x, kind), jnp.asarray(x))
    assert difference(pooled, expected.detach()) < 1e-15
    gradient = pull_back(jnp.asarray(weights))[0]
    assert np.abs(np.asarray(gradient) - theirs.grad.numpy().transpose(0, 2, 3, 1)).max() < 1e-15
    assert jax.jvp(lambda x: global_pool(x, kind), (x,), (x,))[1].shape == pooled.shape
    assert global_pool(jnp.zeros((0, 4, 5, 8)), kind).shape[0] == 0


@pytest.mark.parametrize(("name", "shape"), [("avg", (1, 1, 9, 3)), ("blur", (1, 9, 1, 3))])
def test_maps_that_are_too_small(name, shape):
    with pytest.raises(ValueError, match=f"aa_layer '{name}' has come to maps of {shape[1]} x {shape[2]} pixels"):
        ANTI_ALIASING[name]()(jnp.ones(shape))


@pytest.mark.parametrize("options", [(1, 1, 1, 1), (1, 2, 1, 1), (3, 2, 1, 1), (3, 1, 2, 4), (7, 2, 1, 1)])
def test_conv_equals_torch(options, x64):
    kernel, stride, dilation, groups = options
    theirs = torch.nn.Conv2d(
        8, 12, kernel, stride, dilation * (kernel - 1) // 2, dilation, groups, bias=False, dtype=torch.float64
    )
    ours = Conv(8, 12, kernel, stride=stride, dilation=dilation, groups=groups, param_dtype="float64")
    ours.kernel.set_value(jnp.asarray(theirs.weight.detach().numpy().transpose(2, 3, 1, 0)))
    x = images((2, 13, 10, 8), "float64")
    assert difference(ours(jnp.asarray(x)), theirs(nchw(x))) < 1e-14
