import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from res2net_jax.folding import COLUMNS, fold


def layers(dtype, bias):
    """A convolution and its norm, twice: of 64 and of 400 output channels."""
    rng = np.random.default_rng(0)
    for columns in (64, 400):
        kernel = jnp.asarray(rng.standard_normal((1, 1, 96, columns)), dtype)
        norm = [jnp.asarray(rng.uniform(0.5, 1.5, columns), dtype) for _ in range(4)]
        yield kernel, jnp.asarray(rng.standard_normal(columns), dtype) if bias else None, *norm


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-15), ("float32", 3e-7), ("bfloat16", 0.02)])
def test_numpy_and_xla_fold_alike(dtype, tolerance, bias, x64):
    given, cut = list(layers(dtype, bias)), (False, True)
    ours = fold(given, cut)
    assert [[kernel.shape[-1] for kernel in kernels] for kernels, _ in ours] == [[64], [COLUMNS, COLUMNS, 112]]
    expected = jax.jit(lambda given: fold(given, cut))(given)  # of arrays that are traced
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype == dtype and one.shape == other.shape
        difference = np.abs(np.float64(one) - np.float64(other)).max()
        assert difference <= tolerance * np.abs(np.float64(other)).max()


@pytest.mark.filterwarnings("error")
def test_weights_that_are_not_finite_stay_so():
    kernel, bias, *norm = next(layers("float32", bias=True))
    ((kernels, bias),) = fold([(kernel.at[0, 0, 0, 0].set(np.inf), bias, *norm[:3], norm[3].at[1].set(-1))], [False])
    assert np.isinf(kernels[0][0, 0, 0, 0]) and np.isnan(kernels[0][0, 0, 0, 1]) and np.isnan(bias[1])


def test_what_is_folded_stays_where_it_was():
    uncommitted = list(layers("float32", bias=True))
    committed = jax.device_put(uncommitted, jax.devices()[0])
    for given in (uncommitted, committed):
        folded = jax.tree.leaves(fold(given, (True, True)))
        assert {array.committed for array in folded} == {given is committed}


def test_what_is_sharded_over_one_device_may_be_folded(x64):
    given, cut = list(layers("float64", bias=True)), (False, True)
    mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])

    def shard(array):
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*[None] * (array.ndim - 1), "model")))

    sharded = jax.tree.map(shard, given)
    for one, other in zip(jax.tree.leaves(fold(sharded, cut)), jax.tree.leaves(fold(given, cut)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)


def test_jax_takes_the_folded_kernels_without_a_copy():
    ((one,), _), ((other,), _) = fold(list(layers("float32", bias=False)), (False, False))
    assert one.nbytes % 64 == one.unsafe_buffer_pointer() % 64 == 0
    assert other.unsafe_buffer_pointer() == one.unsafe_buffer_pointer() + one.nbytes  # one after the other, as made


def test_a_folded_kernel_has_nothing_of_the_one_it_was_made_from():
    given = list(layers("float32", bias=False))
    ((kernel,), _), _ = fold(given, (False, False))
    before = np.array(kernel)
    for array in jax.tree.leaves(given):
        array.delete()  # as a training step that donates its state would
    assert np.array_equal(kernel, before)
