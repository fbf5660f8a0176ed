import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from beside_torch import difference, images, nchw
from flax import nnx

import porting
import res2net_jax
from res2net_jax import Arch, Res2Net, get_variant
from res2net_jax.init import initialize, variables


def ported(name, reference, dtype, **options):
    model = Res2Net(get_variant(name).arch, param_dtype=dtype, name=name, **options)
    return porting.load_state_dict(model, reference.state_dict()).eval()


@jax.jit
def forward(model, x):
    features, stages = model.forward_intermediates(x)
    return [*stages, model.forward_head(features)]


@pytest.mark.parametrize("name", res2net_jax.VARIANTS)
@pytest.mark.parametrize(
    ("dtype", "size", "tolerance"),
    [("float64", (224, 224), 1e-12), ("float64", (97, 131), 1e-12), ("float32", (224, 224), 1e-5)],
)
def test_logits_and_stages_equal_timm(name, dtype, size, tolerance, timm_model, x64):
    reference = timm_model(name).to(getattr(torch, dtype))
    x = images((1, *size, 3), dtype)
    with torch.inference_mode():
        features, theirs = reference.forward_intermediates(nchw(x))
        theirs.append(reference.forward_head(features))
    ours = forward(ported(name, reference, dtype), x)
    assert len(ours) == len(theirs) == 6
    for a, b in zip(ours, theirs):
        assert a.dtype == dtype
        assert difference(a, b) < tolerance


@pytest.mark.parametrize(
    ("name", "options"),
    [("res2net50_26w_4s", {}), *((name, {"layers": (1, 2, 1, 1)}) for name in ("res2next50", "res2net50d"))],
)
def test_training_step_equals_torch(name, options, timm_model, x64):
    reference = timm_model(name, **options).double().train()
    model = res2net_jax.create(name, param_dtype="float64", **options)
    porting.load_state_dict(model, reference.state_dict())
    x, labels = images((4, 75, 64, 3), "float64"), np.array([3, 1, 4, 159])

    loss = torch.nn.functional.cross_entropy(reference(nchw(x)), torch.from_numpy(labels))
    loss.backward()

    @jax.jit
    def loss_and_grads(params, stats):
        def loss_fn(params):
            merged = nnx.merge(graphdef, params, stats, copy=True)
            log_probabilities = jax.nn.log_softmax(merged(x))
            return -log_probabilities[jnp.arange(4), labels].mean(), nnx.state(merged, nnx.BatchStat)

        return jax.value_and_grad(loss_fn, has_aux=True)(params)

    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    (our_loss, new_stats), grads = loss_and_grads(params, stats)

    assert abs(float(our_loss) - loss.item()) < 1e-12 * loss.item()
    theirs = {key: parameter.grad.numpy() for key, parameter in reference.named_parameters()}
    theirs |= {key: buffer.numpy() for key, buffer in reference.named_buffers() if "tracked" not in key}
    nnx.update(model, grads, new_stats)
    ours = porting.state_dict(model)
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        tolerance = 1e-11 if "running" in key else 1e-9
        assert np.abs(ours[key] - expected).max() <= tolerance * np.abs(expected).max(), key


@pytest.mark.parametrize(
    "arch",
    [
        {"scale": 1},
        {"scale": 3, "base_width": 20, "cardinality": 2},
        {"channels": (16, 24, 32, 40)},
        {"stem_type": "deep", "stem_width": 32},
        {"avg_down": True},
    ],
    ids=str,
)
def test_other_architectures_equal_timm(arch, x64):
    import timm

    torch.manual_seed(1)
    theirs = {"block_args": {"scale": arch.get("scale", 4)}} | {k: v for k, v in arch.items() if k != "scale"}
    reference = timm.create_model("res2net50_26w_4s", layers=(1, 2, 1, 1), zero_init_last=False, **theirs)
    reference.double().eval()
    model = res2net_jax.create("res2net50_26w_4s", layers=(1, 2, 1, 1), param_dtype="float64", **arch).eval()
    porting.load_state_dict(model, reference.state_dict())
    x = images((2, 61, 64, 3), "float64")
    with torch.inference_mode():
        features, theirs = reference.forward_intermediates(nchw(x))
        theirs.append(reference.forward_head(features))
    for a, b in zip(forward(model, x), theirs, strict=True):
        assert difference(a, b) < 1e-12


SMALL = {"layers": (1, 1), "channels": (16, 32)}


@pytest.fixture(scope="module")
def small():
    return res2net_jax.create("res2net50_26w_4s", num_classes=10, **SMALL).eval()


def test_same_seed_same_weights():
    first, again, other = (variables(res2net_jax.create("res2net50_14w_8s", rngs=seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(first[path], again[path]) for path in first)
    assert any(not np.array_equal(first[path], other[path]) for path in first)
    assert not np.array_equal(first["layer1.1.convs.0.kernel"], first["layer1.1.convs.1.kernel"])


@pytest.mark.parametrize("rngs", [nnx.Rngs, jax.random.key, jax.random.PRNGKey], ids=["Rngs", "key", "PRNGKey"])
def test_rngs_of_flax_and_keys_of_jax_seed_too(rngs):
    make = lambda seed: variables(res2net_jax.create("res2net50_26w_4s", rngs=rngs(seed), **SMALL))  # noqa: E731
    assert np.array_equal(make(0)["conv1.kernel"], make(0)["conv1.kernel"])
    assert not np.array_equal(make(0)["conv1.kernel"], make(1)["conv1.kernel"])
    outside = rngs(0)
    for seed in (lambda: rngs(0), lambda: outside):
        if rngs is nnx.Rngs and seed() is outside:
            continue  # whose count Flax itself keeps from being changed within
        with pytest.raises(ValueError, match="fresh weights need a whole number"):
            jax.jit(lambda seed=seed: res2net_jax.create("res2net50_26w_4s", rngs=seed(), **SMALL).bn1.scale[...])()


def test_initialisation_is_timm_s():
    import timm

    torch.manual_seed(0)
    theirs = {k: v.numpy() for k, v in timm.create_model("res2next50").state_dict().items()}
    ours = porting.state_dict(res2net_jax.create("res2next50"))
    for key, value in ours.items():
        if theirs[key].std() == 0 or key.startswith("fc.bias"):
            assert np.abs(theirs[key]).max() == pytest.approx(np.abs(value).max(), rel=0.02, abs=1e-12), key
        elif value.size > 1000:
            # the standard deviation of n samples is known to 1 / sqrt(2 n): five times that, on both sides
            assert value.std() == pytest.approx(theirs[key].std(), rel=10 / np.sqrt(2 * value.size)), key
            assert abs(value.mean()) < 6 * theirs[key].std() / np.sqrt(value.size), key
    assert not ours["layer1.0.bn3.weight"].any()
    kept = res2net_jax.create("res2net50_26w_4s", zero_init_last=False, **SMALL)
    assert (np.asarray(variables(kept)["layer1.0.bn3.scale"]) == 1).all()


def test_bfloat16_computes_on_float32_weights_and_statistics(small):
    model = res2net_jax.create("res2net50_26w_4s", num_classes=10, dtype=jnp.bfloat16, **SMALL)
    assert {leaf.dtype for leaf in variables(model).values()} == {jnp.dtype("float32")}
    x = images((2, 64, 64, 3), "float32")
    run = nnx.jit(lambda model, x: model(x))
    full, half = run(small, x), run(model.eval(), x)
    assert half.dtype == jnp.bfloat16
    assert np.abs(half.astype("float32") - full).max() < 0.05 * np.abs(full).max()
    run(model.train(), x)
    assert variables(model)["bn1.mean"].get_value().any()
    assert {leaf.dtype for leaf in variables(model).values()} == {jnp.dtype("float32")}


def test_train_and_eval_return_the_model_and_switch_the_norms(small):
    model = res2net_jax.create("res2net50_26w_4s", **SMALL)
    before = np.asarray(variables(model)["bn1.mean"])
    assert model.eval() is model
    model(jnp.ones((1, 32, 32, 3)))
    assert np.array_equal(before, variables(model)["bn1.mean"])
    assert model.train() is model
    model(jnp.ones((1, 32, 32, 3)))
    assert not np.array_equal(before, variables(model)["bn1.mean"])


def test_intermediates_and_head(small):
    x = jnp.asarray(images((2, 64, 96, 3), "float32"))
    features, every = small.forward_intermediates(x)
    assert [m.shape[-1] for m in every] == [info["num_chs"] for info in small.feature_info]
    assert [64 // m.shape[1] for m in every] == [info["reduction"] for info in small.feature_info]
    assert np.array_equal(features, every[-1]) and np.array_equal(features, small.forward_features(x))
    assert len(small.forward_intermediates(x, 2)[1]) == 2
    for ours, theirs in zip(small.forward_intermediates(x, [-1, 0])[1], [every[0], every[2]], strict=True):
        assert np.array_equal(ours, theirs)
    with pytest.raises(ValueError, match="no feature 3; this model has 3"):
        small.forward_intermediates(x, [3])
    pooled = small.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, small.num_features)
    assert np.allclose(small.fc(pooled), small(x))


def test_reset_classifier(small):
    x = jnp.asarray(images((2, 32, 32, 3), "float32"))
    model = initialize(Res2Net(Arch(**SMALL), num_classes=10), 0).eval()
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert np.array_equal(model(x), pooled)
    model.reset_classifier(4, "catavgmax")
    assert model(x).shape == (2, 4) and model.fc.kernel.shape == (2 * model.num_features, 4)
    for options in ({"global_pool": ""}, {"global_pool": "max", "class_names": ["a"]}):
        with pytest.raises(ValueError):
            model.reset_classifier(7, **options)
        assert model(x).shape == (2, 4)
    with pytest.raises(ValueError, match="rngs"):
        model.reset_classifier(7, rngs=-1)
    assert model(x).shape == (2, 4)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros((2, 3, 32, 32), "float32"), ValueError, r"looks like NCHW.*transpose\(0, 2, 3, 1\)"),
        (np.zeros((32, 32, 3), "float32"), ValueError, r"x\[None\]"),
        (np.zeros((2, 32, 32, 1), "float32"), ValueError, r"\[batch, height, width, 3\]"),
        (np.zeros((2, 32, 32, 3), "uint8"), TypeError, "preprocess"),
        (np.zeros((2, 32, 32, 3), ">f4"), TypeError, r"no numbers of type dtype\('>f4'\); pass images.astype"),
        (np.zeros((2, 32, 32, 3), np.longdouble), TypeError, "no numbers of type dtype"),
        (np.full((2, 32, 32, 3), "a"), TypeError, "no numbers of type dtype"),
    ],
)
def test_images_of_the_wrong_kind(small, x, error, message):
    for run in (small, res2net_jax.compile(small)):
        with pytest.raises(error, match=message):
            run(x)


@pytest.mark.parametrize("indices", ["12", [1.0], True, [True], 1.5])
def test_features_that_are_no_numbers(small, indices):
    with pytest.raises(ValueError, match="features are picked by"):
        small.forward_intermediates(jnp.zeros((1, 32, 32, 3)), indices)


def test_a_model_without_weights_says_so():
    with pytest.raises(ValueError, match="create or load"):
        Res2Net(Arch(**SMALL))(jnp.zeros((1, 32, 32, 3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_widht": 3}, "did you mean base_width"),
        ({"scale": 0}, "scale must be a whole number from 1 up; got 0"),
        ({"layers": 3}, "layers must be a tuple"),
        ({"rngs": -1}, "seed"),
        ({"rngs": "a"}, "seed"),
        ({"dtype": "int32"}, "dtype must be a floating-point type"),
        ({"param_dtype": "float64"}, "jax_enable_x64"),
        ({"layers": (1, 2)}, "2 layers"),
        ({"base_width": 0}, "base_width must be"),
        ({"channels": (8, 16, 32, 64), "base_width": 4}, "give at least 8"),
        ({"channels": (64, 64, 64, 8), "base_width": 4}, "give at least 8"),
        ({"stem_type": "wide"}, "stem_type must be one of '', 'deep', 'deep_tiered'"),
        ({"stem_width": 32}, "needs a deep stem"),
        ({"output_stride": 4}, "output_stride must be one of 32, 16, 8; got 4"),
        ({"act_layer": "prelu"}, "act_layer must be one of 'relu'"),
        ({"attn_layer": "cbam"}, "attn_layer must be one of '', 'se', 'eca'"),
        ({"aa_layer": "box"}, "aa_layer must be one of"),
        ({"global_pool": ""}, "no classifier takes; pass num_classes=0"),
        ({"global_pool": "mean"}, "global_pool must be one of 'avg', 'max'"),
        ({"drop_rate": 1}, "drop_rate must be a number from 0"),
        ({"down_kernel_size": 2}, "must be odd"),
        ({"avg_down": True, "down_kernel_size": 3}, "leave down_kernel_size at 1"),
        ({"avg_down": 1}, "avg_down must be True or False"),
        ({"block_reduce_first": 2}, "timm ignores it silently"),
        ({"dtype": "f32"}, "dtype must be a floating-point type, e.g. float32 or bfloat16; got 'f32'"),
        ({"num_classes": -1}, "num_classes"),
        ({"in_chans": 0}, "in_chans"),
    ],
)
def test_options_that_make_no_model(options, message):
    with pytest.raises(ValueError, match=message):
        res2net_jax.create("res2net50_26w_4s", **options)


def test_numpy_numbers_count():
    one = np.int64(1)
    options = {"layers": (one,), "channels": (np.int32(16),), "drop_rate": np.float32(0.5)}
    model = res2net_jax.create("res2net50_26w_4s", num_classes=np.int64(3), rngs=one, **options)
    assert model.num_classes == 3 and model.arch == Arch(layers=(1,), channels=(16,), drop_rate=0.5)
    assert type(model.arch.drop_rate) is float  # for a checkpoint's metadata


@pytest.mark.parametrize("stem_type", ["", "deep"])
def test_models_can_be_copied_and_pickled(stem_type):
    model = res2net_jax.create("res2net50_26w_4s", stem_type=stem_type, act_layer="quick_gelu", **SMALL).eval()
    x = jnp.asarray(images((1, 32, 32, 3), "float32"))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), nnx.merge(*nnx.split(model))):
        assert np.array_equal(twin(x), model(x))


def test_transformations_of_jax_take_the_model(small):
    x = jnp.asarray(images((2, 32, 32, 3), "float32"))
    expected = jax.jit(lambda m, x: m(x))(small, x)
    assert np.allclose(nnx.jit(lambda m, x: m(x))(small, x), expected, rtol=1e-4, atol=1e-6)
    assert np.allclose(jax.vmap(lambda x: small(x[None])[0])(x), expected, rtol=1e-4, atol=1e-6)
    assert jax.eval_shape(lambda m, x: m(x), small, x).shape == (2, 10)
    assert jax.jvp(lambda x: small(x), (x,), (x,))[1].shape == (2, 10)


@pytest.mark.parametrize("attn_layer", ["", "se", "eca"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_types_are_common_also_where_jax_is_strict(param_dtype, attn_layer):
    model = res2net_jax.create(
        "res2net50_26w_4s", attn_layer=attn_layer, dtype="bfloat16", param_dtype=param_dtype, **SMALL
    )
    with jax.numpy_dtype_promotion("strict"):
        x = jnp.ones((2, 32, 32, 3), jnp.float32)
        logits = jax.eval_shape(lambda model, x: model(x), model.eval(), x)
        assert logits.dtype == res2net_jax.compile(model)(x).dtype == jnp.bfloat16
        gradient = jax.grad(lambda model: model(x).astype("float32").sum(), allow_int=True)
        gradients = nnx.state(jax.eval_shape(gradient, model.train()), nnx.Param)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(param_dtype)}
