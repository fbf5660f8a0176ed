import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from res2net_jax.folding import fold

LAYOUTS = ("HWIO", "pieces", "WIHO", "pieces")


def layers(dtype, bias):
    """Convolutions and their norms: 1x1 of 64 and of 400 output channels, 3x3 of 24 and of 400."""
    rng = np.random.default_rng(0)
    for size, columns in ((1, 64), (1, 400), (3, 24), (3, 400)):
        kernel = jnp.asarray(rng.standard_normal((size, size, 96 // size, columns)), dtype)
        norm = [jnp.asarray(rng.uniform(0.5, 1.5, columns), dtype) for _ in range(4)]
        yield kernel, jnp.asarray(rng.standard_normal(columns), dtype) if bias else None, *norm


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-15), ("float32", 3e-7), ("bfloat16", 3e-7)])
def test_numpy_and_xla_fold_alike(dtype, tolerance, bias, x64):
    given = list(layers(dtype, bias))
    ours = fold(given, LAYOUTS)
    shapes = [[kernel.shape for kernel in kernels] for kernels, _ in ours]
    assert shapes[:2] == [[(1, 1, 96, 64)], [(1, 1, 96, 144), (1, 1, 96, 144), (1, 1, 96, 112)]]
    assert shapes[2:] == [[(3, 32, 3, 24)], [(1, 3, 32, 192), (1, 3, 32, 208)] * 3]
    expected = jax.jit(lambda given: fold(given, LAYOUTS))(given)  # of arrays that are traced
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype == (dtype if dtype == "float64" else "float32") and one.shape == other.shape
        difference = np.abs(np.float64(one) - np.float64(other)).max()
        assert difference <= tolerance * np.abs(np.float64(other)).max()


@pytest.mark.filterwarnings("error")
def test_weights_that_are_not_finite_stay_so():
    kernel, bias, *norm = next(layers("float32", bias=True))
    ((kernels, bias),) = fold([(kernel.at[0, 0, 0, 0].set(np.inf), bias, *norm[:3], norm[3].at[1].set(-1))], ["HWIO"])
    assert np.isinf(kernels[0][0, 0, 0, 0]) and np.isnan(kernels[0][0, 0, 0, 1]) and np.isnan(bias[1])


def test_what_is_folded_stays_where_it_was():
    uncommitted = list(layers("float32", bias=True))
    committed = jax.device_put(uncommitted, jax.devices()[0])
    for given in (uncommitted, committed):
        folded = jax.tree.leaves(fold(given, LAYOUTS))
        assert {array.committed for array in folded} == {given is committed}


def test_what_is_sharded_over_one_device_may_be_folded(x64):
    given = list(layers("float64", bias=True))
    mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])

    def shard(array):
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*[None] * (array.ndim - 1), "model")))

    sharded = jax.tree.map(shard, given)
    for one, other in zip(jax.tree.leaves(fold(sharded, LAYOUTS)), jax.tree.leaves(fold(given, LAYOUTS)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)


def test_jax_takes_the_folded_kernels_without_a_copy():
    ((one,), _), ((other,), _) = fold(list(layers("float32", bias=False))[:2], ["HWIO", "HWIO"])
    assert one.nbytes % 64 == one.unsafe_buffer_pointer() % 64 == 0
    assert other.unsafe_buffer_pointer() == one.unsafe_buffer_pointer() + one.nbytes  # one after the other, as made


def test_a_folded_kernel_has_nothing_of_the_one_it_was_made_from():
    given = list(layers("float32", bias=False))
    ((kernel,), _), *_ = fold(given, ["HWIO"] * 4)
    before = np.array(kernel)
    for array in jax.tree.leaves(given):
        array.delete()  # as a training step that donates its state would
    assert np.array_equal(kernel, before)
