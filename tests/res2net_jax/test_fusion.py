import dataclasses
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import porting
import res2net_jax
from res2net_jax import backend, convolution
from res2net_jax.backend import compiler_options
from res2net_jax.blocks import Bottle2neck
from res2net_jax.features import FeaturePyramid
from res2net_jax.fusion import _COMPILED, _program, compiled
from res2net_jax.init import variables
from res2net_jax.layers import BatchNorm, Conv

SMALL = {"layers": (2, 1), "channels": (16, 32), "zero_init_last": False}
OPTIONS = [
    {},
    {"stem_type": "deep", "stem_width": 16, "avg_down": True},
    {"cardinality": 2, "scale": 3, "attn_layer": "se"},
    {"replace_stem_pool": True},
    {"replace_stem_pool": True, "aa_layer": "blurpc"},
    {"num_classes": 0, "global_pool": "catavgmax", "act_layer": "silu"},
    {"output_stride": 8, "layers": (1, 2, 2), "channels": (16, 32, 256), "base_width": 64, "scale": 2},
]


plain = jax.jit(lambda model, x: model(x))  # quicker than one operation after the other, each with a program of its own


def random_model(param_dtype, **options):
    model = res2net_jax.create("res2net50_26w_4s", param_dtype=param_dtype, **(SMALL | options)).eval()
    rng = np.random.default_rng(0)
    for path, leaf in variables(model).items():
        if path.endswith((".scale", ".var")):
            leaf.set_value(jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype))
        elif path.endswith((".bias", ".mean")):
            leaf.set_value(jnp.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype))
    return model


def images(dtype="float32", batch=2):
    return jnp.asarray(np.random.default_rng(1).standard_normal((batch, 45, 64, 3)), dtype)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fused_and_compiled_models_compute_the_same(options, x64):
    model = random_model("float64", **options)
    x = images("float64")
    expected = plain(model, x)
    for run in (functools.partial(plain, res2net_jax.fuse(model)), res2net_jax.compile(model)):
        assert np.abs(run(x) - expected).max() < 1e-13 * np.abs(expected).max()
    assert np.array_equal(plain(model, x), expected)  # the model itself is left as it was


def test_a_compiled_model_has_convolutions_of_its_own_on_a_cpu():
    model = random_model("float32")
    counts = [
        str(jax.make_jaxpr(run)(images())).count("conv_general_dilated[") for run in (model, res2net_jax.compile(model))
    ]
    # Of the nine of 3x3, three are strided; the stem is one more.
    assert counts == [10, 4]
    assert "transpose[" not in str(jax.make_jaxpr(res2net_jax.compile(model))(images()))  # of a kernel, in every call


def test_fusion_leaves_one_kernel_and_one_bias_a_convolution():
    fused = variables(res2net_jax.fuse(random_model("float32")))
    assert {path.rsplit(".", 1)[1] for path in fused} == {"kernel", "bias"}
    blurred = res2net_jax.fuse(random_model("float32", replace_stem_pool=True, aa_layer="blurpc"))
    assert isinstance(blurred.maxpool[2], BatchNorm) and not blurred.maxpool[2].folded  # a blur lies between


def test_bfloat16_stays_bfloat16():
    model = random_model("float32", dtype=jnp.bfloat16)
    run = res2net_jax.compile(model)
    out = run(images())
    assert out.dtype == jnp.bfloat16
    weights = jax.make_jaxpr(run)(images()).consts
    assert {leaf.dtype for leaf in weights} == {jnp.dtype("bfloat16")}  # cast once, not in every call
    plain = np.asarray(random_model("float32")(images()))
    assert np.abs(np.asarray(out, "float32") - plain).max() < 0.05 * np.abs(plain).max()


def test_a_compiled_model_within_another_program(x64):
    model, x = random_model("float64"), images("float64")
    run = res2net_jax.compile(model)
    within = jax.jit(lambda x: run(2 * x) + 1)(x)
    np.testing.assert_allclose(within, np.asarray(run(2 * x)) + 1, rtol=1e-12, atol=1e-12)
    gradient = jax.grad(lambda x: run(x).sum())(x)
    expected = jax.grad(lambda x: plain(model, x).sum())(x)
    np.testing.assert_allclose(gradient, expected, rtol=1e-10, atol=1e-12 * np.abs(expected).max())


def test_a_compiled_model_within_a_program_that_its_images_are_no_part_of(x64):
    model, x = random_model("float64"), images("float64")
    run = res2net_jax.compile(model)
    expected = np.asarray(run(x))
    np.testing.assert_allclose(jax.jit(lambda y: run(x) + y)(1.0), expected + 1, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(jax.lax.map(lambda y: run(x) * y, jnp.ones(2))[1], expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(jax.vmap(run)(x[:, None])[:, 0], expected, rtol=1e-12, atol=1e-12)
    with jax.transfer_guard("disallow"):
        np.testing.assert_array_equal(run(images=x), expected)


def test_a_compiled_model_of_weights_that_are_differentiated(x64):
    graphdef, state = nnx.split(random_model("float64"))
    x = images("float64")

    def slope(run_of):
        return jax.grad(lambda state: jnp.sum(jnp.sin(run_of(nnx.merge(graphdef, state))(x))))(state)

    ours, expected = slope(res2net_jax.compile), slope(lambda model: functools.partial(plain, model))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.abs(a - b).max() <= 1e-11 * np.abs(b).max()


def test_a_compiled_model_exported_for_any_batch(x64):
    model = random_model("float64", base_width=128, scale=2)
    (batch,) = jax.export.symbolic_shape("b")
    images_of_any = jax.ShapeDtypeStruct((batch, 45, 64, 3), "float64")
    exported = jax.export.export(jax.jit(res2net_jax.compile(model)))(images_of_any)
    for count in (1, 3):
        x = images("float64", count)
        expected = plain(model, x)
        assert np.abs(exported.call(x) - expected).max() < 1e-13 * np.abs(expected).max()


def test_a_compiled_model_outlives_the_weights_it_was_made_from():
    model = random_model("float32")
    run, expected = res2net_jax.compile(model), np.asarray(plain(model, images()))
    state = nnx.state(model)
    jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)(state)  # as a training step
    assert model.fc.kernel.get_value().is_deleted()
    np.testing.assert_allclose(run(images()), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("attn_layer", ["", "se"])
def test_the_model_keeps_its_weights_in_their_type(attn_layer):
    model = random_model("float32", dtype="bfloat16", attn_layer=attn_layer)
    before = {path: leaf.get_value() for path, leaf in variables(model).items()}
    res2net_jax.fuse(model)
    res2net_jax.classify(model, np.asarray(images()))
    res2net_jax.compile(model)
    after = {path: leaf.get_value() for path, leaf in variables(model).items()}
    assert after.keys() == before.keys() and all(after[path] is before[path] for path in before)


def test_a_pyramid_has_variables_of_its_own():
    model = random_model("float32")
    before = {path: leaf.get_value() for path, leaf in variables(model).items()}
    pyramid = FeaturePyramid(model, (1,)).train()
    pyramid(images())
    assert (pyramid.backbone.bn1.mean.get_value() != before["bn1.mean"]).all()
    res2net_jax.fuse(pyramid.eval()).backbone.conv1.kernel.set_value(jnp.zeros(()))
    after = {path: leaf.get_value() for path, leaf in variables(model).items()}
    assert after.keys() == before.keys() and all(after[path] is before[path] for path in before)


def test_a_compiled_and_a_fused_pyramid(x64):
    pyramid, x = random_model("float64", features_only=True, out_indices=(0, 2)), images("float64")
    expected = plain(pyramid, x)
    fused = res2net_jax.fuse(pyramid)
    assert fused.backbone.bn1.folded and not pyramid.backbone.bn1.folded
    for maps in (res2net_jax.compile(pyramid)(x), plain(fused, x)):
        for ours, theirs in zip(maps, expected, strict=True):
            assert np.abs(ours - theirs).max() < 1e-13 * np.abs(theirs).max()


def test_large_convolutions_of_a_compiled_model_and_of_its_training(x64):
    """By Winograd's algorithm, whose 16 products the program then has, and their gradients' 32."""
    options = SMALL | {"layers": (1,), "channels": (32,), "base_width": 128, "scale": 2}
    model = random_model("float64", **options)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 64, 64, 3)))
    run = res2net_jax.compile(model)
    assert str(jax.make_jaxpr(run)(x)).count("dot_general") >= 16 > str(jax.make_jaxpr(model)(x)).count("dot_general")
    expected = plain(model, x)
    assert np.abs(run(x) - expected).max() < 1e-13 * np.abs(expected).max()

    graphdef, state = nnx.split(model.train())
    direct = nnx.merge(graphdef, state)
    direct.set_attributes(convolve=convolution.direct)

    def gradients(graphdef):
        return jax.jit(jax.grad(lambda state: jnp.sum(jnp.sin(nnx.merge(graphdef, state)(x)))))

    ours, expected = gradients(graphdef), gradients(nnx.graphdef(direct))
    products = [str(jax.make_jaxpr(gradient)(state)).count("dot_general") for gradient in (ours, expected)]
    assert products[0] >= 48 > products[1]
    for a, b in zip(jax.tree.leaves(ours(state)), jax.tree.leaves(expected(state)), strict=True):
        assert np.abs(a - b).max() <= 1e-11 * np.abs(b).max()


LARGE_3X3 = {"layers": (1,), "channels": (256,), "base_width": 64, "scale": 2}
LARGE_1X1 = {"layers": (1, 1), "channels": (128, 256), "base_width": 64, "scale": 2}


def test_large_1x1_kernels_of_a_compiled_model_are_cut(x64, monkeypatch):
    """Those of the second stage: 512 x 512, 512 x 1024, and the shortcut's, which is strided."""
    model, x = random_model("float64", **LARGE_1X1), images("float64")[:, :40]  # too small for Winograd's
    for cores, products in (1, 7), (2, 7 - 3 + 4 + 7 + 7):
        monkeypatch.setattr(backend, "cores", lambda cores=cores: cores)
        run = res2net_jax.compile(model)
        assert str(jax.make_jaxpr(run)(x)).count("dot_general") == products
    expected = plain(model, x)
    assert np.abs(run(x) - expected).max() < 1e-13 * np.abs(expected).max()
    assert variables(model)["layer2.0.conv3.kernel"].shape == (1, 1, 512, 1024)  # the model itself is left as it was

    graphdef, state = nnx.split(model)
    within = jax.jit(lambda state, x: res2net_jax.compile(nnx.merge(graphdef, state))(x))(state, x)
    assert np.abs(within - expected).max() < 1e-13 * np.abs(expected).max()
    (batch,) = jax.export.symbolic_shape("b")
    exported = jax.export.export(jax.jit(run))(jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype))
    assert np.abs(exported.call(x) - expected).max() < 1e-13 * np.abs(expected).max()
    assert run(x[:0]).shape == (0, 1000)


def test_large_3x3_kernels_of_a_compiled_model_are_cut(x64, monkeypatch):
    """Of 256 channels, into three rows of two pieces each, beside ten products; a batch of two is Winograd's."""
    model, x = random_model("float64", **LARGE_3X3), images("float64", 1)
    monkeypatch.setattr(backend, "cores", lambda: 1)
    assert str(jax.make_jaxpr(res2net_jax.compile(model))(x)).count("dot_general") == 10 - 6  # 1x1 ones whole too
    monkeypatch.setattr(backend, "cores", lambda: 2)
    run = res2net_jax.compile(model)
    for batch, products in (1, 3 * 2), (2, 16 * 2):
        x = images("float64", batch)
        assert str(jax.make_jaxpr(run)(x)).count("dot_general") == 10 + products
        expected = plain(model, x)
        assert np.abs(run(x) - expected).max() < 1e-13 * np.abs(expected).max()
    (batch,) = jax.export.symbolic_shape("b")
    exported = jax.export.export(jax.jit(run))(jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype))
    assert np.abs(exported.call(x) - expected).max() < 1e-13 * np.abs(expected).max()


@pytest.mark.parametrize("options", [{"dtype": "float64"}, {"dtype": jnp.bfloat16}], ids=str)
def test_kernels_that_a_call_would_cast_are_not_cut(options, x64, monkeypatch):
    monkeypatch.setattr(backend, "cores", lambda: 2)
    for large, products in (LARGE_1X1, 7), (LARGE_3X3, 4):
        run = res2net_jax.compile(random_model("float32", **large, **options))
        assert str(jax.make_jaxpr(run)(images(batch=1)[:, :40])).count("dot_general") == products


@pytest.mark.parametrize("make", [lambda model: model, res2net_jax.fuse, res2net_jax.compile])
def test_no_images_have_no_logits(make):
    assert make(random_model("float32"))(images(batch=0)).shape == (0, 1000)


def test_what_is_compiled_is_kept_until_the_model_changes(x64):
    model, other, x = random_model("float64"), random_model("float64"), images("float64")
    run = compiled(model)
    assert compiled(model) is run
    compilations = _program.cache_info().misses
    for change in (
        lambda model: model.fc.kernel.set_value(model.fc.kernel.get_value() * 2),
        lambda model: model.stages[0][0].bn1.mean.set_value(model.stages[0][0].bn1.mean.get_value() + 1),
    ):
        before = compiled(model)(x)
        change(model)
        expected = plain(model, x)
        assert np.abs(compiled(model)(x) - expected).max() < 1e-13 * np.abs(expected).max()
        assert np.abs(before - expected).max() > 1e-3 * np.abs(before).max()
    assert np.abs(compiled(other)(x) - other(x)).max() < 1e-13 * np.abs(other(x)).max()
    assert _program.cache_info().misses == compilations  # one program for all of these weights
    model.arch = dataclasses.replace(model.arch, global_pool="max")
    expected = plain(model, x)
    assert np.abs(compiled(model)(x) - expected).max() < 1e-13 * np.abs(expected).max()
    bias = np.array(model.fc.bias.get_value())
    model.fc.bias.set_value(bias)
    before = compiled(model)(x)
    bias[0] += 100
    np.testing.assert_allclose(compiled(model)(x)[:, 0], before[:, 0] + 100)
    alive = len(_COMPILED)
    del model
    gc.collect()
    assert len(_COMPILED) == alive - 1


def test_blocks_that_differ_in_their_weights_alone_are_traced_once(monkeypatch):
    traced, call = [], Bottle2neck.__call__
    monkeypatch.setattr(Bottle2neck, "__call__", lambda block, x, key: traced.append(x.shape) or call(block, x, key))
    _program.cache_clear()
    run = res2net_jax.compile(random_model("float32", layers=(3, 4)))
    run(images())
    assert traced == [(2, 12, 16, 64), (2, 12, 16, 64), (2, 6, 8, 128)]  # of seven blocks; the fourth strides
    run(images())
    assert len(traced) == 3


class Twice(Bottle2neck):
    def __call__(self, x, key=None):
        return 2 * super().__call__(x, key)


def test_a_block_of_another_class_is_called_as_it_is():
    model = random_model("float32")
    before = plain(model, images())
    model.layer1[1].__class__ = Twice
    expected = plain(model, images())
    assert np.abs(expected - before).max() > 0.1 * np.abs(before).max()
    for run in (functools.partial(plain, res2net_jax.fuse(model)), res2net_jax.compile(model)):
        assert np.abs(run(images()) - expected).max() < 1e-5 * np.abs(expected).max()


class Circular(Conv):
    """Its borders meet."""

    def __call__(self, x):
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap")
        out = jax.lax.conv_general_dilated(
            x, self.kernel[...], (self.stride,) * 2, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return out if self.bias is None else out + self.bias[...]


@pytest.mark.parametrize("options", [{}, LARGE_3X3], ids=str)
def test_a_convolution_of_another_class_has_its_kernel_as_it_is(options, x64, monkeypatch):
    monkeypatch.setattr(backend, "cores", lambda: 2)
    model, x = random_model("float64", **options), images("float64", 1)
    before = plain(model, x)
    for _, module in nnx.iter_modules(model):
        if type(module) is Conv and module.kernel.shape[0] == 3:
            module.__class__ = Circular
    expected = plain(model, x)
    assert np.abs(res2net_jax.compile(model)(x) - expected).max() < 1e-13 * np.abs(expected).max()
    assert np.abs(before - expected).max() > 1e-3 * np.abs(expected).max()


def test_numpy_weights_are_copied_wherever_they_begin():
    model = random_model("float32")
    memory = np.zeros(1000 + 16, "float32")
    start = -memory.ctypes.data % 64 // 4
    aligned = memory[start : start + 1000]  # which JAX could take as it is
    model.fc.bias.set_value(aligned)
    run = res2net_jax.compile(model)
    before = np.array(run(images()))
    aligned += 100
    assert np.array_equal(run(images()), before)


def test_a_compiled_model_that_computes_its_blocks_again():
    model = random_model("float32")
    expected = res2net_jax.compile(model)(images())
    model.set_grad_checkpointing()
    assert np.array_equal(res2net_jax.compile(model)(images()), expected)


def test_a_subclass_is_compiled_as_it_is():
    class Halved(res2net_jax.Res2Net):
        def __call__(self, x, key=None):
            return super().__call__(x, key) / 2

    model, x = random_model("float32"), images()
    expected = np.asarray(res2net_jax.compile(model)(x)) / 2
    model.__class__ = Halved
    np.testing.assert_allclose(res2net_jax.compile(model)(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("param_dtype", "options"), [("float16", {}), ("bfloat16", {"attn_layer": "eca"})])
def test_sixteen_bit_weights_are_not_rounded_once_more(param_dtype, options, x64, tmp_path):
    """By folding them, where float32 images make it a computation in float32."""
    narrow, exact = random_model(param_dtype, **options), random_model("float64", **options)
    for path, leaf in variables(exact).items():
        leaf.set_value(jnp.asarray(variables(narrow)[path].get_value(), "float64"))
    expected, x = plain(exact, images("float64")), images()
    models = (functools.partial(plain, model) for model in (narrow, res2net_jax.fuse(narrow)))
    for run in (*models, res2net_jax.compile(narrow)):
        assert np.abs(run(x) - expected).max() < 1e-5 * np.abs(expected).max()
        assert run(x.astype(param_dtype)).dtype == param_dtype
    res2net_jax.export(narrow, tmp_path / "m.stablehlo", size=32)


def test_a_single_norm_that_goes_by_the_batch():
    model = random_model("float32").train()
    model.bn1.use_running_average = True  # a frozen stem
    for call in (
        lambda: res2net_jax.compile(model),
        lambda: res2net_jax.fuse(model),
        lambda: res2net_jax.classify(model, images()),
        lambda: res2net_jax.explain(model, images()),
    ):
        with pytest.raises(ValueError, match=r"call model.eval\(\)"):
            call()


def test_what_are_no_images():
    model = random_model("float32")
    for call in (model, res2net_jax.compile(model)):
        for images, message in (
            (torch.zeros(1, 32, 32, 3), r"got a Tensor. pass its .numpy\(\)"),
            ("photo.jpg", "got a str. res2net_jax.preprocess"),
            ([[1.0]], "got a list"),
        ):
            with pytest.raises(TypeError, match=message):
                call(images)
        assert call(nnx.Param(jnp.zeros((1, 32, 32, 3)))).shape == (1, 1000)
        with pytest.raises(ValueError, match="at least one pixel"):
            call(np.zeros((1, 0, 32, 3), "float32"))
    with pytest.raises(TypeError, match="expected a Res2Net; got a str"):
        res2net_jax.feature_extractor("res2net50d")


def test_what_a_pyramid_is_not_for(tmp_path, photos):
    pyramid = res2net_jax.create("res2net50_26w_4s", features_only=True, layers=(1,), channels=(16,)).eval()
    for misuse in (
        lambda: res2net_jax.feature_extractor(pyramid),
        lambda: res2net_jax.save_features(pyramid, photos, tmp_path / "f.npy"),
        lambda: res2net_jax.classify(pyramid, photos),
        lambda: res2net_jax.explain(pyramid, images()),
        lambda: res2net_jax.push_to_hub(pyramid, "me/pyramid"),
        lambda: porting.load_state_dict(pyramid, {}),
    ):
        with pytest.raises(TypeError, match="expected a Res2Net; got a FeaturePyramid"):
            misuse()
    assert not list(tmp_path.iterdir())


def test_what_a_fused_model_is_not_for(tmp_path):
    model = random_model("float32")
    fused = res2net_jax.fuse(model)
    for misuse in (fused.train, lambda: res2net_jax.save(fused, tmp_path / "m")):
        with pytest.raises(ValueError, match="for inference alone"):
            misuse()
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        res2net_jax.compile(model.train())
    assert res2net_jax.fuse(fused.eval()) is not None


def test_options_of_the_backends():
    assert compiler_options("tpu") == {}
    assert len(compiler_options("cpu")) == 2, "this jaxlib refuses one of the options"
    assert len(compiler_options("gpu", inference=True)) == 3, "this jaxlib refuses one of the options"
    jax.jit(lambda x: x + 1, compiler_options=compiler_options("cpu"))(1.0)


def test_an_option_that_a_jaxlib_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setattr(backend, "_CPU", backend._CPU | {"xla_cpu_of_another_year": "1"})
    backend._options.cache_clear()
    assert compiler_options("cpu").keys() == backend._CPU.keys() - {"xla_cpu_of_another_year"}
    backend._options.cache_clear()
