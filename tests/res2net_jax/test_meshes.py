"""Compiled models and training on meshes of explicit axes, as jax.make_mesh makes them, and within jax.shard_map."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import res2net_jax
from res2net_jax import microbatch

plain = jax.jit(lambda model, x: model(x))


@pytest.fixture
def model(x64):
    """Wide enough for Winograd's algorithm."""
    options = {"layers": (1,), "channels": (32,), "base_width": 128, "scale": 2, "zero_init_last": False}
    return res2net_jax.create("res2net50_26w_4s", param_dtype="float64", **options).eval()


def images(batch=6):
    return np.random.default_rng(0).standard_normal((batch, 64, 64, 3))


def gradients(model, x):
    graphdef, params, rest = nnx.split(model.train(), nnx.Param, ...)

    def step(params, x=x):
        return jax.grad(lambda params: jnp.sin(nnx.merge(graphdef, params, rest, copy=True)(x)).sum())(params)

    return step, params


def assert_close(ours, expected, tolerance):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= tolerance * np.abs(b).max()


def test_a_mesh_of_one_device(model, monkeypatch):
    monkeypatch.setattr(microbatch, "VALUES", 2**16)  # so that stages take a few images at a time
    mesh = jax.make_mesh((1,), ("data",))
    assert mesh.axis_types == (jax.sharding.AxisType.Explicit,)
    placed = jax.device_put(model, jax.NamedSharding(mesh, jax.P()))
    x = jax.device_put(images(), jax.NamedSharding(mesh, jax.P("data")))
    expected = plain(model, images())
    run = res2net_jax.compile(placed)
    for given in (x, images()):
        assert_close(run(given), expected, 1e-13)
    assert run(x).sharding.spec[0] == "data" and run(images()).sharding.spec[0] is None
    assert_close(jax.jit(lambda x: run(x) * 2)(x), expected * 2, 1e-13)
    with jax.set_mesh(mesh):
        assert_close(run(x), expected, 1e-13)
    assert "scan[" in str(jax.make_jaxpr(run)(x))
    (step, params), (on_the_mesh, placed_params) = gradients(model, images()), gradients(placed, x)
    assert_close(jax.jit(on_the_mesh)(placed_params), jax.jit(step)(params), 1e-11)


def test_a_step_within_shard_map_on_one_device(model):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    step, params = gradients(model, images())
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(jax.P(), jax.P("data")), out_specs=jax.P())
    assert_close(jax.jit(mapped)(params, images()), jax.jit(step)(params), 1e-11)


def test_a_mesh_of_four_devices():
    program = """
import jax, numpy as np, res2net_jax
mesh = jax.make_mesh((2, 2), ("data", "rows"))
everywhere, spread = jax.NamedSharding(mesh, jax.P()), jax.NamedSharding(mesh, jax.P("data", "rows"))
model = res2net_jax.create("res2net50_26w_4s", layers=(1, 1), channels=(16, 64)).eval()
images = np.random.default_rng(0).standard_normal((4, 64, 64, 3)).astype("float32")
expected = jax.jit(lambda model, x: model(x))(model, images)
alone = res2net_jax.compile(jax.device_put(model, jax.devices()[0]))  # as load puts it
model, images = jax.device_put(model, everywhere), jax.device_put(images, spread)
try:
    alone(images)
except ValueError as error:
    assert "the images are on other devices than the weights; give load a sharding=" in str(error), error
else:
    raise AssertionError
run = res2net_jax.compile(model)
np.testing.assert_allclose(run(images), expected, rtol=1e-4, atol=1e-5)
assert run(images).sharding.spec[0] == "data"
(maps,) = res2net_jax.compile(res2net_jax.FeaturePyramid(model, (1,)))(images)
assert maps.sharding.spec[0] == "data"
assert len(res2net_jax.classify(model, images)) == 4
assert res2net_jax.feature_extractor(model, "layer1")(images).sharding.spec[0] == "data"
print("done")
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    arguments = [sys.executable, "-c", program]
    done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | flags, timeout=120)
    assert done.stdout == "done\n", done.stderr[-2000:]
