"""The max-pool and its gradient against torch's: values, ties, edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from res2net_jax.pooling import max_pool


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1), (2, 5)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("stride", [1, 2])
def test_max_pool_and_its_gradient_equal_torchs(size, stride, x64):
    rng = np.random.default_rng(0)
    # One decimal place, and zeros as after a ReLU: many windows hold their maximum more than once.
    x = np.maximum(np.round(rng.standard_normal((2, *size, 3)), 1), 0)
    theirs = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    expected = torch.nn.functional.max_pool2d(theirs, 3, stride, padding=1)
    weights = rng.standard_normal(expected.shape)
    expected.backward(torch.tensor(weights))

    out, pullback = jax.vjp(lambda x: max_pool(x, stride), jnp.asarray(x))
    (gradient,) = pullback(jnp.asarray(weights.transpose(0, 2, 3, 1)))
    np.testing.assert_array_equal(out.transpose(0, 3, 1, 2), expected.detach())
    np.testing.assert_allclose(gradient.transpose(0, 3, 1, 2), theirs.grad, rtol=0, atol=1e-14)


def test_max_pool_forward_mode_and_second_derivatives(x64):
    x, x_dot, g = np.random.default_rng(0).standard_normal((3, 2, 7, 9, 3))
    _, tangent = jax.jvp(max_pool, (x,), (x_dot,))
    _, pullback = jax.vjp(max_pool, jnp.asarray(x))
    g = g[:, :4, :5]
    np.testing.assert_allclose((tangent * g).sum(), (pullback(jnp.asarray(g))[0] * x_dot).sum(), rtol=1e-12)
    # d/dx of sum(max^3) along x_dot, once more differentiated: 6 max (max_dot)^2 where the maximum is.
    first = jax.grad(lambda x: (max_pool(x) ** 3).sum())
    second = jax.jvp(first, (jnp.asarray(x),), (x_dot,))[1]
    np.testing.assert_allclose((second * x_dot).sum(), (6 * max_pool(x) * tangent**2).sum(), rtol=1e-12)
