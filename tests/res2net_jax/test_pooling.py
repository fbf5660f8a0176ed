"""The max-pool and its gradient against torch's: values, ties, edges, inputs that the compiler computes anew."""

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


def test_no_gradient_is_lost_where_the_input_is_fused_into_the_pool(x64):
    rng = np.random.default_rng(0)
    x, scale, mean = (jnp.asarray(rng.standard_normal(shape)) for shape in ((4, 32, 32, 8), (8,), (8,)))

    @jax.jit
    def gradient(shift):
        # What comes in is computed from x, as a normalised map is, and may be computed again in every fusion.
        return jax.grad(lambda shift: max_pool((x - mean) * (scale * 0.37) + shift).sum())(shift)

    np.testing.assert_allclose(gradient(mean), np.full(8, 4 * 16 * 16.0), rtol=1e-12)
