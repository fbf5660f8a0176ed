"""What is computed in another way on a GPU is the same function; computed here, in float64, on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from beside_torch import difference, nchw
from flax import nnx

import res2net_jax
from res2net_jax import alignment, convolution, layers
from res2net_jax.cost import cost

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Takes the ways of a GPU with 16-bit numbers, whatever the type."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(alignment, "multiple", lambda dtype: 8)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def equal(a, b, tolerance=1e-12):
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize("size, features", [(7, 3), (3, 3), (3, 4), (7, 1)])
def test_a_stem_by_depth(size, features):
    x, kernel = normal(2, 10, 14, features), normal(size, size, features, 5, seed=1)
    plain = convolution.direct(x, kernel, stride=2, dilation=1, groups=1)
    equal(convolution.by_depth(x, kernel), plain)


@pytest.mark.parametrize(
    ("sides", "features", "size", "stride"),
    [((11, 14), 3, 7, 2), ((10, 13), 3, 3, 2), ((5, 30), 14, 3, 1), ((5, 29), 28, 3, 1)],
    ids=["a stem of odd height", "of odd width", "a map of no whole fours of columns", "of no whole pairs"],
)
def test_sides_that_the_ways_of_a_gpu_do_not_divide(as_on_a_gpu, sides, features, size, stride):
    x, kernel = normal(2, *sides, features), normal(size, size, features, 5, seed=1)
    ours = convolution.direct(x, kernel, stride=stride, dilation=1, groups=1)
    weights = torch.tensor(np.asarray(kernel).transpose(3, 2, 0, 1))
    theirs = torch.nn.functional.conv2d(nchw(np.asarray(x)), weights, stride=stride, padding=size // 2)
    assert difference(ours, theirs) < 1e-12


@pytest.mark.parametrize("columns", [2, 4])
def test_columns_together_with_their_gradients(columns):
    x, kernel, weights = normal(2, 5, 8, 3), normal(3, 3, 3, 6, seed=1), normal(2, 5, 8, 6, seed=2)

    def plain(x, kernel):
        return convolution.direct(x, kernel, stride=1, dilation=1, groups=1)

    def wide(x, kernel):
        return convolution.by_columns(x, kernel, columns)

    equal(wide(x, kernel), plain(x, kernel))
    ours, theirs = (jax.grad(lambda *a, f=f: (f(*a) * weights).sum(), (0, 1))(x, kernel) for f in (wide, plain))
    for a, b in zip(ours, theirs):
        equal(a, b)


@pytest.mark.parametrize("width", [8, 9])  # a whole number of fours, and one that leaves a rest
def test_columns_of_a_kernel_that_was_widened_before(width):
    x, kernel, bias = normal(2, 5, width, 3), normal(3, 3, 3, 6, seed=1), normal(6, seed=2)
    wide = convolution.widen(kernel, 4).transpose(3, 0, 1, 2)
    plain = convolution.direct(x, kernel, stride=1, dilation=1, groups=1) + bias
    equal(convolution.in_columns(x, wide, jnp.tile(bias, 4), 4), plain)


def test_a_kernel_of_outputs_first():
    x, kernel = normal(2, 9, 7, 6), normal(3, 3, 3, 4, seed=1)
    options = {"stride": 2, "dilation": 2, "groups": 2}
    equal(convolution.out_first(x, kernel.transpose(3, 0, 1, 2), **options), convolution.direct(x, kernel, **options))


def test_splits_are_padded_and_cut():
    x = jnp.arange(1.0, 13)
    padded = alignment.pad(x, 4, 8)
    np.testing.assert_array_equal(padded.reshape(4, 8)[:, :3], x.reshape(4, 3))
    assert not padded.reshape(4, 8)[:, 3:].any()
    np.testing.assert_array_equal(alignment.cut(padded, 4, 12), x)
    assert alignment.pad(padded, 4, 8) is padded
    assert alignment.pad(x, None, 8) is x


@pytest.mark.parametrize("shape", [(1, 4, 5, 5, 3), (2, 3, 40, 40, 3)])  # summed by images first, and not
@pytest.mark.parametrize("mean", [0, 1e6])
def test_moments_in_one_pass(as_on_a_gpu, shape, mean):
    x = mean + normal(*shape)
    for ours, exact in zip(layers._moments(x), (x.mean((1, 2, 3), keepdims=True), x.var((1, 2, 3), keepdims=True))):
        equal(ours, exact, tolerance=1e-12 if mean == 0 else 1e-9)


MODELS = {
    "splits of 14 and 28": ("res2net50_14w_8s", {}),
    "splits of 26 and 52": ("res2net50_26w_4s", {}),
    "one split": ("res2net50_26w_4s", {"scale": 1, "base_width": 30}),
    "groups": ("res2next50", {}),
    "a deep stem": ("res2net50d", {}),
}


@pytest.fixture(params=MODELS, ids=str)
def model(request):
    name, arch = MODELS[request.param]
    arch |= {"layers": (2, 2), "channels": (64, 128)}
    model = res2net_jax.create(name, param_dtype=jnp.float64, num_classes=10, zero_init_last=False, **arch)
    # Fresh norms are the identity, and would leave hardly a feature alive.
    centres = {"scale": (0.8, 0.2), "bias": (0.0, 0.4), "mean": (0.0, 0.1), "var": (0.5, 0.05)}
    for i, (_, norm) in enumerate(nnx.iter_modules(model)):
        if isinstance(norm, layers.BatchNorm):
            for name, (centre, spread) in centres.items():
                leaf = getattr(norm, name)
                leaf.set_value(centre + spread * normal(*leaf.shape, seed=i))
    return model


def test_a_step_of_training(model, request):
    images, labels = normal(2, 64, 112, 3), jnp.array([3, 7])

    def loss(params, stats):
        bound = nnx.merge(graphdef, params, stats, copy=True)
        logits = bound(images)
        return -jax.nn.log_softmax(logits)[jnp.arange(2), labels].mean(), (logits, nnx.state(bound, nnx.BatchStat))

    graphdef, params, stats = nnx.split(model.train(), nnx.Param, nnx.BatchStat)
    step = lambda: jax.jit(jax.value_and_grad(loss, has_aux=True))(params, stats)  # noqa: E731
    plain = step()
    request.getfixturevalue("as_on_a_gpu")
    jax.clear_caches()
    ours = step()
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        equal(a, b, tolerance=1e-11)


@pytest.mark.parametrize("width", [64, 112])  # with a first stage that is 16 or 28 wide
def test_a_compiled_model(model, width, request):
    images = normal(2, 64, width, 3)
    plain = jax.jit(lambda model, images: model(images))(model.eval(), images)
    assert (jnp.abs(plain - model.fc.bias[...]) > 0.1).any(), "a dead network, of which all ways are equal"
    request.getfixturevalue("as_on_a_gpu")
    equal(res2net_jax.compile(model)(images), plain)
    equal(jax.jit(lambda model, images: model(images))(model, images), plain)


def test_sixteen_bit_weights_and_float32_images(monkeypatch):
    """The answer is in float32, of weights that were rounded to 16 bits again after their norms were folded in."""
    options = {"layers": (2,), "channels": (64,), "num_classes": 10, "zero_init_last": False}
    model = res2net_jax.create("res2net50_14w_8s", param_dtype=jnp.bfloat16, **options).eval()
    images = normal(1, 32, 32, 3).astype(jnp.float32)
    plain = jax.jit(lambda model, images: model(images))(model, images)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    ours = res2net_jax.compile(model)(images)
    assert ours.dtype == jnp.float32
    equal(ours, plain, tolerance=2**-8)


def test_cost_is_of_the_channels_that_there_are(monkeypatch):
    model = res2net_jax.create("res2net50_14w_8s", dtype=jnp.bfloat16, layers=(2,), channels=(64,))
    plain = cost(model, 64, 64)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert cost(model, 64, 64) == plain


def test_a_mesh_of_explicit_axes(as_on_a_gpu):
    mesh = jax.make_mesh((1,), ("b",), axis_types=(jax.sharding.AxisType.Explicit,))
    images = jax.device_put(normal(2, 64, 112, 3), jax.NamedSharding(mesh, jax.P("b")))
    model = res2net_jax.create("res2net50_14w_8s", param_dtype=jnp.float64, layers=(2,), channels=(64,)).eval()
    model = jax.device_put(model, jax.NamedSharding(mesh, jax.P()))
    logits = jax.jit(lambda model, images: model(images))(model, images)
    equal(res2net_jax.compile(model)(images), logits)
