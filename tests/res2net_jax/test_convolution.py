"""Each way to compute a convolution against torch's, in float64, with gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import res2net_jax
from res2net_jax import convolution
from res2net_jax.backend import compiler_options
from res2net_jax.convolution import columns_first, direct, for_inference, for_training, in_pieces
from res2net_jax.winograd import winograd, winograd_in_training

PLAIN = {"stride": 1, "dilation": 1, "groups": 1}
BY_ROWS, FEW_TILES, WINOGRAD = (2, 9, 8, 5), (1, 7, 7, 72), (1, 23, 26, 120)
CHOICES = pytest.mark.parametrize("choose", [for_inference, for_training])


def by_rows(x, kernel):
    return convolution.by_rows(x, kernel.transpose(1, 2, 0, 3))


def close(ours, theirs):
    return np.abs(ours - theirs).max() < 1e-13 * np.abs(theirs).max()


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1), (2, 5), (1, 40), (33, 34)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("convolve", [by_rows, winograd, winograd_in_training])
def test_equals_torch_with_gradients(convolve, size, x64):
    check(convolve, (2, *size, 5))


@pytest.mark.parametrize("shape", [BY_ROWS, FEW_TILES, WINOGRAD], ids=str)
@CHOICES
def test_what_is_chosen_equals_torch(choose, shape, x64):
    check(functools.partial(choose, **PLAIN), shape)


@pytest.mark.parametrize("change", [{"stride": 2}, {"dilation": 2}, {"groups": 2}], ids=str)
@pytest.mark.parametrize("shape", [(2, 9, 8, 6), (1, 23, 26, 120)], ids=str)
@CHOICES
def test_strided_dilated_and_grouped_equal_torch(choose, change, shape, x64):
    check(functools.partial(choose, **PLAIN | change), shape, **change)


@pytest.mark.parametrize("change", [{}, {"stride": 2}, {"groups": 2}], ids=str)
@CHOICES
def test_of_one_pixel_equals_torch(choose, change, x64):
    check(functools.partial(choose, **PLAIN | change), (2, 9, 8, 10), size=1, **change)


@pytest.mark.parametrize("stride", [1, 2])
def test_in_pieces_equals_torch(stride, x64):
    def cut(x, kernel):
        return in_pieces(x, jnp.split(kernel, [3, 4], axis=-1), stride=stride)

    check(cut, (2, 9, 8, 10), size=1, stride=stride)


def products(convolve, shape):
    arguments = jnp.zeros(shape), jnp.zeros((3, 3, shape[-1], 6))
    return str(jax.make_jaxpr(convolve)(*arguments)).count("dot_general")


@pytest.mark.parametrize("shape, count", [(FEW_TILES, 3 * 2), (WINOGRAD, 16 * 2), ((2, 1, 1, 5), 3 * 2)], ids=str)
def test_pieces_of_3x3_equal_torch(shape, count, x64):
    def cut(x, kernel):
        return in_pieces(x, [part for row in jnp.split(kernel, 3) for part in jnp.split(row, [4], axis=-1)], stride=1)

    check(cut, shape)
    assert products(cut, shape) == count


@pytest.mark.parametrize("shape, count", [(BY_ROWS, 1), ((1, 56, 56, 48), 16)], ids=str)
def test_narrow_kernels_with_their_columns_first_equal_torch(shape, count, x64):
    def turned(x, kernel):
        return columns_first(x, kernel.transpose(1, 2, 0, 3), **PLAIN)

    check(turned, shape)
    assert products(turned, shape) == count


def test_winograd_in_training_has_no_forward_mode():
    x, kernel = jnp.zeros(WINOGRAD), jnp.zeros((3, 3, WINOGRAD[-1], 8))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: for_training(x, kernel, **PLAIN), (x,), (x,))


def test_gradient_of_a_narrowing_product_has_fewer_rows():
    x, kernel = jnp.zeros((1, 20, 20, 40)), jnp.zeros((1, 1, 40, 6))

    def loss(kernel):
        return jnp.sum(for_training(x, kernel, **PLAIN) ** 2)

    text = jax.jit(jax.grad(loss)).lower(kernel).compile().as_text()
    assert re.search(r"= f32\[6,40\]\S* dot\(", text) and not re.search(r"= f32\[40,6\]\S* dot\(", text)


def check(convolve, shape, size=3, **options):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape)
    kernel = rng.standard_normal((size, size, shape[-1] // options.get("groups", 1), 6))
    their_x = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    their_kernel = torch.tensor(kernel.transpose(3, 2, 0, 1), requires_grad=True)
    padding = options.get("dilation", 1) * (size // 2)
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


def test_second_derivatives_in_training(x64):
    rng = np.random.default_rng(0)
    arguments = jnp.asarray(rng.standard_normal(WINOGRAD)), jnp.asarray(rng.standard_normal((3, 3, 120, 6)))
    directions = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape)), arguments)

    def products(convolve):
        def loss(x, kernel):
            return jnp.sum(jnp.sin(convolve(x, kernel, **PLAIN)))

        def slope(*arguments):
            gradients = jax.grad(loss, (0, 1))(*arguments)
            return sum(jnp.vdot(g, d) for g, d in zip(gradients, directions))

        forward_over_reverse = jax.jvp(jax.grad(loss, (0, 1)), arguments, directions)[1]
        return jax.tree.leaves((forward_over_reverse, jax.grad(slope, (0, 1))(*arguments)))

    for ours, plain in zip(jax.jit(lambda: products(for_training))(), jax.jit(lambda: products(direct))()):
        assert np.abs(ours - plain).max() < 1e-12 * np.abs(plain).max()


def test_rounding_in_float32_stays_near_that_of_a_plain_convolution(x64, optimized):
    rng = np.random.default_rng(0)
    x, kernel, weights = (rng.standard_normal(shape) for shape in ((2, 28, 28, 52), (3, 3, 52, 52), (2, 28, 28, 52)))

    def with_gradients(convolve, dtype):
        out, pullback = jax.vjp(convolve, jnp.asarray(x, dtype), jnp.asarray(kernel, dtype))
        return out, *pullback(jnp.asarray(weights, dtype))

    plain = functools.partial(direct, **PLAIN)
    exact = with_gradients(plain, "float64")

    def errors(convolve):
        pairs = zip(with_gradients(convolve, "float32"), exact)
        return np.array([np.abs(rounded - value).max() / np.abs(value).max() for rounded, value in pairs])

    assert np.all(errors(by_rows) < 3 * errors(plain))
    assert np.all(errors(winograd) < 6 * errors(plain))
    assert np.all(errors(winograd_in_training) < 6 * errors(plain))


def program(choose, shape, dtype="float32", **change):
    kernel = jnp.zeros((3, 3, shape[-1] // change.get("groups", 1), 6), dtype)
    return str(jax.make_jaxpr(functools.partial(choose, **PLAIN | change))(jnp.zeros(shape, dtype), kernel))


@CHOICES
def test_the_choice_on_a_cpu(choose):
    assert program(choose, WINOGRAD).count("dot_general") == 16
    assert program(choose, BY_ROWS).count("dot_general") == (1 if choose is for_inference else 0)
    for shape, options in (
        (FEW_TILES, {}),
        (BY_ROWS, {"stride": 2}),
        (WINOGRAD, {"dilation": 2}),
        (WINOGRAD, {"groups": 2}),
        (WINOGRAD, {"dtype": "bfloat16"}),  # whose rounding a transform would multiply
    ):
        assert "conv_general_dilated" in program(choose, shape, **options)


@CHOICES
def test_the_choice_elsewhere(choose, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "conv_general_dilated" in program(choose, WINOGRAD)


def test_the_choice_in_training_on_many_devices(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert "conv_general_dilated" in program(for_training, WINOGRAD)
    assert "conv_general_dilated" not in program(for_inference, WINOGRAD)


class Outer(nnx.Module):
    def __init__(self, backbone):
        self.backbone = backbone


@pytest.mark.parametrize("within", [lambda model: model, Outer], ids=["the model", "a module around it"])
def test_a_model_convolves_as_its_mode_asks(within, monkeypatch):
    ways = {"for_training": for_training, "direct": direct}
    called = set()
    for name, way in ways.items():
        monkeypatch.setattr(convolution, name, lambda *a, name=name, way=way, **k: (called.add(name), way(*a, **k))[1])
    model = res2net_jax.create("res2net50_26w_4s", layers=(1,), channels=(16,))
    outer, x = within(model), jnp.zeros((1, 16, 16, 3))

    def used():
        called.clear()
        model(x)
        return called - ({"direct"} if "for_training" in called else set())  # which the other one may take

    assert used() == {"for_training"}
    outer.eval()
    assert used() == {"direct"}
    jax.jvp(lambda x: model(x), (x,), (x,))
    outer.train()
    assert used() == {"for_training"}


@pytest.mark.parametrize("first", [1.0, np.inf, -np.inf, np.nan])
def test_to_wait_for_the_images_changes_no_kernel(first):
    kernel = np.random.default_rng(0).standard_normal((3, 3, 4, 4)).astype("float32")
    x = jnp.full((1, 8, 8, 4), first, "float32")
    assert np.array_equal(jax.jit(convolution._once_there_is)(x, kernel), kernel)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA:CPU")
def test_kernels_are_transformed_one_after_the_other():
    kernels = [np.zeros((3, 3, 96, 96), "float32")] * 12
    transformed = 12 * 16 * 96 * 96 * 4

    def memory(convolve):
        def layers(x, kernels):
            for kernel in kernels:
                x = jax.nn.relu(convolve(x, kernel))
            return x

        program = jax.jit(layers, compiler_options=compiler_options())
        return (
            program.lower(np.zeros((1, 28, 28, 96), "float32"), kernels).compile().memory_analysis().temp_size_in_bytes
        )

    assert memory(functools.partial(for_inference, **PLAIN)) < transformed
    assert memory(winograd) > transformed, "this XLA would do so by itself"
