"""A Res2Net among Flax's own modules and within JAX's transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import res2net_jax
from res2net_jax.blocks import call_block, checkpointed
from res2net_jax.features import FeaturePyramid
from res2net_jax.groups import layer_scales
from res2net_jax.init import variables

TINY = {"layers": (1, 1), "channels": (8, 16), "base_width": 16, "num_classes": 5}


class Segmenter(nnx.Module):
    """A backbone of ours under a norm and a dropout of Flax's."""

    def __init__(self, backbone):
        self.backbone = backbone
        rngs = nnx.Rngs(0)
        self.norm = nnx.BatchNorm(backbone.feature_info.channels()[-1], rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, images, key=None):
        return self.drop(self.norm(self.backbone(images, key)[-1]))


@pytest.fixture
def images():
    return np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)


@pytest.fixture
def model():
    return res2net_jax.create("res2net50_26w_4s", **TINY)


def test_a_view_of_flax_reaches_the_backbone(images):
    backbone = res2net_jax.create("res2net50_26w_4s", **TINY, drop_path_rate=0.5, features_only=True)
    segmenter = Segmenter(backbone.train())
    view = nnx.view(segmenter, deterministic=True, use_running_average=True)
    before = np.array(view.backbone.backbone.bn1.mean[...])
    assert np.array_equal(view(images), view(images))  # nor does it ask for a key
    assert np.array_equal(view.backbone.backbone.bn1.mean[...], before)
    with pytest.raises(ValueError, match="needs a random key"):
        segmenter(images)  # is as it was


def test_an_evaluated_model_that_computes_its_blocks_again_may_be_closed_over(model, images):
    model.eval().set_grad_checkpointing()
    saliency = jax.jit(jax.grad(lambda x: model(x).sum()))(images)
    model.set_grad_checkpointing(False)
    expected = jax.jit(jax.grad(lambda x: model(x).sum()))(images)
    np.testing.assert_allclose(saliency, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_a_model_that_computes_its_blocks_again_keeps_its_statistics(model, images):
    twin = nnx.clone(model)
    twin.set_grad_checkpointing()
    step = nnx.jit(nnx.grad(lambda model, x: model(x).sum()))
    step(model, images), step(twin, images)
    for ours, plain in zip(*(jax.tree.leaves(nnx.state(m, nnx.BatchStat)) for m in (twin, model)), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)
    assert np.abs(model.layer1[0].bn1.mean[...]).max() > 0


def test_what_a_block_of_flax_s_layers_changes_is_kept_as_well(images):
    class Block(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.norm, self.drop = nnx.BatchNorm(3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x, key=None):
            self.sow(nnx.Intermediate, "seen", x)
            return self.drop(self.norm(x))

    block, twin = Block(), Block()
    for _ in range(2):
        out = checkpointed(call_block)(block, jnp.asarray(images), None)
        np.testing.assert_allclose(out, twin(jnp.asarray(images)), rtol=1e-5, atol=1e-6)  # another mask each time
    states = [dict(nnx.to_flat_state(nnx.state(module))) for module in (block, twin)]
    assert states[0].keys() == states[1].keys()
    np.testing.assert_allclose(block.norm.mean[...], twin.norm.mean[...], rtol=1e-5)


def test_a_new_classifier_goes_where_the_model_is(model):
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    placed = jax.device_put(model, everywhere)
    placed.reset_classifier(3)
    assert placed.fc.kernel[...].sharding == placed.fc.bias[...].sharding == everywhere
    model.reset_classifier(3)
    assert not model.fc.kernel[...].committed  # nor is the rest of it
    assert np.array_equal(model.fc.kernel[...], placed.fc.kernel[...])


def test_rates_by_depth_as_the_documentation_gives_them_to_flax_s_optimizer(model):
    scales = layer_scales(model, 0.5)

    def by_depth(updates, params):
        name = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
        return jax.tree.map_with_path(lambda path, update: scales[name(path)] * update, updates)

    optimizer = nnx.Optimizer(model, optax.chain(optax.sgd(1.0), optax.stateless(by_depth)), wrt=nnx.Param)
    before = {path: leaf.get_value() for path, leaf in variables(model).items()}
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    for path, scale in scales.items():
        np.testing.assert_allclose(before[path] - variables(model)[path].get_value(), scale, atol=1e-6)
    assert len(set(scales.values())) == 4  # stem, two blocks, classifier


def test_a_pyramid_with_a_call_of_its_own(images):
    class Scaled(FeaturePyramid):
        def __call__(self, x, key=None):
            return [2 * features for features in super().__call__(x, key)]

    pyramid = Scaled(res2net_jax.create("res2net50_26w_4s", **TINY).eval())
    with pytest.raises(TypeError, match=r"Scaled has a __call__ of its own.*use jax.jit\(fuse\(model\)\)"):
        res2net_jax.compile(pyramid)
    (last,) = jax.jit(res2net_jax.fuse(pyramid))(images)[-1:]
    np.testing.assert_allclose(last, jax.jit(pyramid)(images)[-1], rtol=1e-4, atol=1e-4)


def test_a_module_that_contains_a_model_is_not_taken_for_one():
    segmenter = Segmenter(res2net_jax.create("res2net50_26w_4s", **TINY, features_only=True))
    for function in (res2net_jax.compile, res2net_jax.fuse):
        with pytest.raises(TypeError, match="got a Segmenter, a module of another class; pass the Res2Net within it"):
            function(segmenter)


def test_a_classifier_of_another_size_that_was_put_in_by_hand(model, images, tmp_path):
    model.eval().fc = nnx.Linear(16 * 4, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"model.reset_classifier\(N\)(.|\n)*fc.bias: \(3,\), expected \(5,\)"):
        res2net_jax.save(model, tmp_path / "model")
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="gives 3 values per image, and is said to have 5 classes"):
        res2net_jax.classify(model, jnp.asarray(images))


def test_names_as_timm_lists_them():
    name = "res2net50_26w_4s"
    assert res2net_jax.get_variant(f"{name}.in1k") is res2net_jax.get_variant(name)
    assert res2net_jax.create(f"{name}.in1k", **TINY).name == name
    with pytest.raises(ValueError, match=f"no model is called '{name}.in21k'; did you mean {name}"):
        res2net_jax.create(f"{name}.in21k")


def test_a_fresh_classifier_of_another_seed(model, tmp_path):
    folder = res2net_jax.save(model, tmp_path / "model")
    heads = [res2net_jax.load(folder, num_classes=3, rngs=seed).fc.kernel[...] for seed in (0, 0, 1, nnx.Rngs(1))]
    assert np.array_equal(heads[0], heads[1]) and not np.array_equal(heads[0], heads[2])
    with pytest.raises(ValueError, match="rngs"):
        res2net_jax.load(folder, num_classes=3, rngs=-1)
