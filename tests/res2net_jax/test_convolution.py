"""Each way to compute a convolution against torch's, in float64, with gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from res2net_jax.convolution import by_rows, direct, on_cpu, winograd

PLAIN = {"stride": 1, "dilation": 1, "groups": 1}
BY_ROWS, FEW_TILES, WINOGRAD = (2, 9, 8, 5), (1, 7, 7, 72), (1, 23, 26, 120)


def close(ours, theirs):
    return np.abs(ours - theirs).max() < 1e-13 * np.abs(theirs).max()


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1), (2, 5)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("convolve", [by_rows, winograd, functools.partial(on_cpu, **PLAIN)])
def test_equals_torch_with_gradients(convolve, size, x64):
    check(convolve, (2, *size, 5))


@pytest.mark.parametrize("shape", [BY_ROWS, FEW_TILES, WINOGRAD], ids=str)
def test_what_is_chosen_on_a_cpu_equals_torch(shape, x64):
    check(functools.partial(on_cpu, **PLAIN), shape)


@pytest.mark.parametrize("change", [{"stride": 2}, {"dilation": 2}, {"groups": 2}], ids=str)
@pytest.mark.parametrize("shape", [(2, 9, 8, 6), (1, 23, 26, 120)], ids=str)
def test_strided_dilated_and_grouped_equal_torch(change, shape, x64):
    check(functools.partial(on_cpu, **PLAIN | change), shape, **change)


def check(convolve, shape, **options):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape)
    kernel = rng.standard_normal((3, 3, shape[-1] // options.get("groups", 1), 6))
    their_x = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    their_kernel = torch.tensor(kernel.transpose(3, 2, 0, 1), requires_grad=True)
    padding = options.get("dilation", 1)
    expected = torch.nn.functional.conv2d(their_x, their_kernel, padding=padding, **options)
    weights = rng.standard_normal(expected.shape)
    expected.backward(torch.tensor(weights))

    @jax.jit
    def with_gradients(x, kernel, weights):
        out, pullback = jax.vjp(convolve, x, kernel)
        return out, *pullback(weights)

    out, x_gradient, kernel_gradient = with_gradients(x, kernel, weights.transpose(0, 2, 3, 1))
    assert close(out.transpose(0, 3, 1, 2), expected.detach().numpy())
    assert close(x_gradient.transpose(0, 3, 1, 2), their_x.grad.numpy())
    assert close(kernel_gradient.transpose(3, 2, 0, 1), their_kernel.grad.numpy())


def test_rounding_in_float32_stays_near_that_of_a_plain_convolution(x64):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 28, 28, 52)), rng.standard_normal((3, 3, 52, 52))
    exact = direct(jnp.asarray(x), jnp.asarray(kernel), **PLAIN)

    def error(convolve):
        return np.abs(convolve(jnp.float32(x), jnp.float32(kernel)) - exact).max() / np.abs(exact).max()

    plain = error(functools.partial(direct, **PLAIN))
    assert error(by_rows) < 3 * plain
    assert error(winograd) < 6 * plain


def test_the_choice_on_a_cpu():
    def primitives(shape, dtype="float32", **change):
        kernel = jnp.zeros((3, 3, shape[-1] // change.get("groups", 1), 6), dtype)
        program = jax.make_jaxpr(functools.partial(on_cpu, **PLAIN | change))(jnp.zeros(shape, dtype), kernel)
        return [equation.primitive.name for equation in program.eqns]

    assert primitives(BY_ROWS).count("dot_general") == 1
    assert primitives(WINOGRAD).count("dot_general") >= 16
    for shape, options in (
        (FEW_TILES, {}),
        (BY_ROWS, {"stride": 2}),
        (WINOGRAD, {"dilation": 2}),
        (WINOGRAD, {"groups": 2}),
        (WINOGRAD, {"dtype": "bfloat16"}),  # whose rounding a transform would multiply
    ):
        assert "conv_general_dilated" in primitives(shape, **options)
