"""Every option of the architecture against timm's, in float64, with timm's random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from timm.layers import BlurPool2d, get_attn

import porting
import res2net_jax
from res2net_jax.groups import layer_scales

SMALL = {"layers": (2, 1, 2, 2), "channels": (8, 16, 16, 24), "base_width": 32}
DEEP = {"stem_type": "deep", "stem_width": 12}
OPTIONS = [
    {},
    {"scale": 1},
    {"scale": 3, "cardinality": 2},
    {"scale": 8, "cardinality": 4, "base_width": 48},
    {"in_chans": 1},
    {"in_chans": 5, **DEEP},
    {"num_classes": 7},
    {"num_classes": 0},
    DEEP,
    {"stem_type": "deep_tiered", "stem_width": 24},
    {"stem_type": "deep_tiered", "stem_width": 16, "in_chans": 2, "replace_stem_pool": True},
    {"replace_stem_pool": True},
    {"avg_down": True},
    {"avg_down": True, "output_stride": 16},
    {"avg_down": True, "output_stride": 8, **DEEP},
    {"down_kernel_size": 3},
    {"down_kernel_size": 3, "output_stride": 16},
    {"down_kernel_size": 3, "output_stride": 8},
    {"output_stride": 16},
    {"output_stride": 8},
    {"output_stride": 8, "cardinality": 2, "scale": 2},
    {"attn_layer": "se"},
    {"attn_layer": "eca", "output_stride": 16},
    {"aa_layer": "avg"},
    {"aa_layer": "blur"},
    {"aa_layer": "blurpc"},
    {"aa_layer": "avg", "replace_stem_pool": True},
    {"aa_layer": "blur", "replace_stem_pool": True, **DEEP},
    {"global_pool": "max"},
    {"global_pool": "avgmax"},
    {"global_pool": "catavgmax"},
    {"global_pool": "", "num_classes": 0},
    {"drop_rate": 0.3, "drop_path_rate": 0.2, "drop_block_rate": 0.1},
    *({"act_layer": name, "layers": (1, 1, 1, 1)} for name in ("silu", "leaky_relu")),
]


class BlurPoolConstant(BlurPool2d):
    def __init__(self, **options):
        super().__init__(pad_mode="constant", **options)


def timm_twin(options, seed=0):
    import timm

    options = SMALL | options
    block_args = {"scale": options.pop("scale", 4)}
    if attention := options.pop("attn_layer", None):
        block_args["attn_layer"] = get_attn(attention)
    anti_aliasing = {
        "avg": torch.nn.AvgPool2d,
        "blur": BlurPool2d,
        "blurpc": BlurPoolConstant,
    }
    if "aa_layer" in options:
        options["aa_layer"] = anti_aliasing[options["aa_layer"]]
    torch.manual_seed(seed)
    model = timm.create_model("res2net50_26w_4s", zero_init_last=False, block_args=block_args, **options)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, 0.0, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.double().eval()


def ours(options, **more):
    return res2net_jax.create("res2net50_26w_4s", param_dtype="float64", **(SMALL | options), **more).eval()


def noise(*shape):
    return np.random.default_rng(0).standard_normal(shape)


def difference(a, b):
    b = b.detach().numpy()
    b = b.transpose(0, 2, 3, 1) if b.ndim == 4 else b
    assert a.shape == b.shape
    return np.abs(np.asarray(a) - b).max() / np.abs(b).max()


@jax.jit
def forward(model, x):
    features, maps = model.forward_intermediates(x)
    return [*maps, model.forward_head(features, pre_logits=True), model.forward_head(features)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_option_equals_timm(options, x64):
    reference = timm_twin(options)
    model = porting.load_state_dict(ours(options), reference.state_dict())
    assert model.feature_info == [dict(info) for info in reference.feature_info]
    assert (model.num_features, model.head_hidden_size) == (reference.num_features, reference.head_hidden_size)
    x = noise(2, 45, 64, options.get("in_chans", 3))
    images = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    with torch.inference_mode():
        features, theirs = reference.forward_intermediates(images)
        theirs += [reference.forward_head(features, pre_logits=True), reference.forward_head(features)]
    for a, b in zip(forward(model, x), theirs, strict=True):
        assert difference(a, b) < 1e-12


@pytest.mark.parametrize("options", [{"attn_layer": "se"}, {"replace_stem_pool": True, "aa_layer": "blur"}], ids=str)
def test_gradients_with_options_equal_torch(options, x64):
    reference = timm_twin(options).train()
    model = porting.load_state_dict(ours(options), reference.state_dict()).train()
    x = noise(4, 64, 64, 3)
    reference(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).square().sum().backward()
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    gradients = jax.jit(jax.grad(lambda p: jnp.square(nnx.merge(graphdef, p, stats, copy=True)(x)).sum()))(params)
    nnx.update(model, gradients)
    mine = porting.state_dict(model)
    for key, parameter in reference.named_parameters():
        expected = parameter.grad.numpy()
        assert np.abs(mine[key] - expected).max() <= 1e-9 * np.abs(expected).max(), key


@pytest.mark.parametrize(
    ("name", "output_stride", "indices"),
    [
        *(("res2net50_26w_4s", stride, None) for stride in (8, 16, 32)),
        ("res2next50", 8, None),
        ("res2net50d", 16, None),
        *(("res2net50_26w_4s", 16, indices) for indices in ((1, 3), (0,), (-1,), 2)),
    ],
)
def test_features_only_equals_timm(name, output_stride, indices, x64):
    import timm

    torch.manual_seed(0)
    options = {"layers": (1, 1, 2, 2), "output_stride": output_stride}
    theirs = (0, 1, 2, 3, 4) if indices is None else indices
    theirs = tuple(range(5))[-theirs:] if isinstance(theirs, int) else theirs
    reference = timm.create_model(name, features_only=True, out_indices=theirs, **options).double().eval()
    whole = timm.create_model(name, zero_init_last=False, **options).double().eval()
    reference.load_state_dict(whole.state_dict(), strict=False)
    model = res2net_jax.create(name, param_dtype="float64", features_only=True, out_indices=indices, **options).eval()
    names = kept(model)
    porting.load_state_dict(model.backbone, {k: v for k, v in whole.state_dict().items() if k in names})
    assert model.feature_info.channels() == reference.feature_info.channels()
    assert model.feature_info.reduction() == reference.feature_info.reduction()
    assert model.feature_info.module_name() == reference.feature_info.module_name()
    x = noise(1, 75, 63, 3)
    with torch.inference_mode():
        expected = reference(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    for a, b in zip(jax.jit(lambda m, x: m(x))(model, x), expected, strict=True):
        assert difference(a, b) < 1e-12


def kept(model):
    """torch keys of what a feature model keeps: no classifier, no stage after the last one picked."""
    return porting.state_dict(model.backbone).keys()


def test_feature_indices_that_do_not_exist():
    for indices, message in [
        ((5,), "no feature 5; this model has 5"),
        ((-6,), "no feature -6"),
        (6, "the last 6"),
        (0, "the last 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            res2net_jax.create("res2net50_26w_4s", features_only=True, out_indices=indices, **SMALL)
    with pytest.raises(ValueError, match="out_indices picks none"):
        res2net_jax.create("res2net50_26w_4s", features_only=True, out_indices=(), **SMALL)
    with pytest.raises(ValueError, match="pass both or neither"):
        res2net_jax.create("res2net50_26w_4s", out_indices=(1,), **SMALL)


def test_feature_pyramid_keeps_only_what_it_needs():
    pyramid = res2net_jax.create("res2net50_26w_4s", features_only=True, out_indices=(0, 2), **SMALL)
    assert {key.split(".")[0] for key in porting.state_dict(pyramid.backbone)} == {"conv1", "bn1", "layer1", "layer2"}
    assert pyramid.eval() is pyramid and pyramid.backbone.bn1.use_running_average
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), "float32")
    assert [m.shape for m in jax.eval_shape(pyramid, images)] == [(2, 32, 32, 64), (2, 8, 8, 64)]
    backbone = pyramid.backbone
    assert [info["module"] for info in backbone.feature_info] == ["act1", "layer1", "layer2"]
    pooled = jax.eval_shape(backbone, images)
    assert pooled.shape == (2, backbone.num_features) == (2, backbone.head_hidden_size)
    with pytest.raises(ValueError, match="no feature 4; this model has 3"):
        backbone.forward_intermediates(jnp.zeros((1, 64, 64, 3)), [4])
    whole = res2net_jax.create("res2net50_26w_4s", **SMALL).eval()
    part = res2net_jax.FeaturePyramid(whole, (1,)).backbone
    assert part.fc is None and not hasattr(part, "layer2") and jax.eval_shape(whole, images).shape == (2, 1000)
    assert part.conv1.kernel.get_value() is whole.conv1.kernel.get_value()
    pyramid.set_grad_checkpointing()
    assert backbone.grad_checkpointing
    for function in (porting.state_dict, lambda model: layer_scales(model, 0.5)):
        with pytest.raises(TypeError, match="got a FeaturePyramid, .* or pass its .backbone"):
            function(pyramid)


def test_stopping_at_the_stem_gives_what_timm_gives(x64):
    reference, model, x = timm_twin({}), ours({}), noise(1, 32, 32, 3)
    porting.load_state_dict(model, reference.state_dict())
    with torch.no_grad():
        expected, _ = reference.forward_intermediates(torch.tensor(x.transpose(0, 3, 1, 2)), [0], stop_early=True)
    found, _ = model.forward_intermediates(jnp.asarray(x), [0], stop_early=True)
    assert difference(found, expected) < 1e-12


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("pretrained", "load gives trained weights"),
        ("checkpoint_path", r"load\(name, source=FILE\)"),
        ("block_args", "scale and attn_layer are options of their own"),
        ("norm_layer", "its norms are BatchNorm"),
        ("scal", "did you mean scale"),
    ],
)
def test_an_option_of_timm_that_is_another_here(option, hint):
    with pytest.raises(ValueError, match=f"no option '{option}'; .*{hint}"):
        res2net_jax.create("res2net50_26w_4s", **{option: 1})


DROPS = {"drop_rate": 0.3, "drop_path_rate": 0.4, "drop_block_rate": 0.2}


def test_rates_equal_timm(x64):
    reference = timm_twin(DROPS)
    model = ours(DROPS)
    for ours_, theirs in zip(
        (b for stage in model.stages for b in stage),
        (b for i in range(1, 5) for b in getattr(reference, f"layer{i}")),
        strict=True,
    ):
        assert ours_.drop_path.rate == pytest.approx(getattr(theirs.drop_path, "drop_prob", 0.0))
        assert ours_.drop_block.rate == getattr(theirs.drop_block, "drop_prob", 0.0)
        if ours_.drop_block.rate:
            assert (ours_.drop_block.block_size, ours_.drop_block.gamma_scale) == (
                theirs.drop_block.block_size,
                theirs.drop_block.gamma_scale,
            )
    assert model.head_drop.rate == reference.drop_rate


def test_checkpointed_gradients_are_the_same(x64):
    model = res2net_jax.create(
        "res2net50_26w_4s", param_dtype="float64", zero_init_last=False, drop_path_rate=0.2, **SMALL
    )
    x, key = noise(2, 64, 64, 3), jax.random.key(3)
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def gradients(checkpointing):
        def loss(params):
            merged = nnx.merge(graphdef, params, stats, copy=True)
            merged.set_grad_checkpointing(checkpointing)
            return jnp.square(merged(x, key)).sum(), nnx.state(merged, nnx.BatchStat)

        jitted = jax.jit(jax.grad(loss, has_aux=True))
        return jitted(params), str(jax.make_jaxpr(jitted)(params)).count("remat")

    (plain, plain_stats), none = gradients(False)
    (again, again_stats), blocks = gradients(True)
    assert none == 0 and blocks >= sum(SMALL["layers"])
    for a, b in zip(jax.tree.leaves((plain, plain_stats)), jax.tree.leaves((again, again_stats)), strict=True):
        assert np.abs(a - b).max() <= 1e-12 * np.abs(a).max()


@pytest.mark.parametrize("coarse", [True, False])
def test_parameter_groups_equal_timm(coarse, x64):
    from timm.models import group_parameters

    from res2net_jax.groups import layer_depths

    reference = timm_twin({})
    model = ours({})
    theirs = group_parameters(reference, reference.group_matcher(coarse), reverse=True)
    ours_ = layer_depths(model, coarse=coarse)
    assert {porting.convert.torch_key(path): depth for path, depth in ours_.items()} == theirs


def test_layer_decay_factors_equal_timm(x64):
    from timm.optim import param_groups_layer_decay

    from res2net_jax.groups import layer_scales

    reference = timm_twin({})
    groups = param_groups_layer_decay(reference, weight_decay=0.05, layer_decay=0.75)
    names = {id(parameter): name for name, parameter in reference.named_parameters()}
    theirs = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    mine = {porting.convert.torch_key(path): scale for path, scale in layer_scales(ours({}), 0.75).items()}
    assert mine.keys() == theirs.keys()
    assert all(mine[name] == pytest.approx(theirs[name]) for name in theirs)
