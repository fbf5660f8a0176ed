import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import porting
import res2net_jax

SMALL = {"layers": (1, 2, 1, 1), "channels": (8, 16, 24, 32), "num_classes": 10}
OURS = SMALL | {"scale": 2}
STAGES = ("act1", "layer1", "layer2", "layer3", "layer4")


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(3, 96, 80, 3))


@pytest.fixture(scope="module")
def twins():
    """timm's model and ours with the same random weights, in float64."""
    import timm

    torch.manual_seed(0)
    reference = timm.create_model("res2net50_26w_4s", block_args={"scale": 2}, **SMALL).double().eval()
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            torch.nn.init.normal_(module.bias, 0.0, 0.1)
            torch.nn.init.normal_(module.running_mean, 0.0, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    with jax.enable_x64(True):
        model = res2net_jax.create("res2net50_26w_4s", param_dtype=jnp.float64, **OURS).eval()
        porting.load_state_dict(model, {key: value.numpy() for key, value in reference.state_dict().items()})
    return reference, model


def torch_maps(reference, images, method, stage, classes):
    """The papers' formulas, on what hooks see of timm's model."""
    seen = {}

    def forward(module, inputs, output):
        seen["features"] = output
        output.register_hook(lambda gradients: seen.update(gradients=gradients))

    handle = reference.get_submodule(stage).register_forward_hook(forward)
    logits = reference(torch.from_numpy(images).permute(0, 3, 1, 2))
    handle.remove()
    logits[torch.arange(len(images)), classes].sum().backward()
    features, gradients = seen["features"].detach(), seen["gradients"]
    if method == "gradcam":
        weights = gradients.mean((2, 3), keepdim=True)
    else:
        alpha = gradients**2 / (2 * gradients**2 + gradients**3 * features.sum((2, 3), keepdim=True))
        weights = (torch.nan_to_num(alpha) * gradients.relu()).sum((2, 3), keepdim=True)
    return (weights * features).sum(1).relu().numpy()


@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
@pytest.mark.parametrize("stage", STAGES)
def test_maps_equal_torch_hooks(twins, x64, images, method, stage):
    reference, model = twins
    classes = [7, 0, 3]
    expected = torch_maps(reference, images, method, stage, classes)
    maps = res2net_jax.explain(model, images, method=method, stage=stage, classes=classes)
    assert maps.shape == expected.shape and maps.dtype == jnp.float64
    assert (expected > 0).any((1, 2)).sum() >= 2
    np.testing.assert_allclose(maps, expected, rtol=0, atol=1e-10 * expected.max())


def test_by_default_the_likeliest_class_at_the_last_stage(twins, x64, images):
    reference, model = twins
    with torch.no_grad():
        likeliest = reference(torch.from_numpy(images).permute(0, 3, 1, 2)).argmax(1)
    expected = torch_maps(reference, images, "gradcam", "layer4", likeliest)
    np.testing.assert_allclose(res2net_jax.explain(model, images), expected, rtol=0, atol=1e-10 * expected.max())


def test_several_classes_an_image(twins, x64, images):
    _, model = twins
    classes = np.array([[1, 2], [3, 3], [9, 0]])
    maps = res2net_jax.explain(model, images, classes=classes)
    assert maps.shape == (3, 2, 3, 3)
    for i in range(2):
        single = res2net_jax.explain(model, images, classes=classes[:, i])
        np.testing.assert_allclose(maps[:, i], single, rtol=0, atol=1e-12 * single.max())
    same = res2net_jax.explain(model, images, classes=3)
    np.testing.assert_allclose(maps[1, 1], same[1], rtol=0, atol=1e-12 * same.max())


def test_half_precision_and_a_fused_model(images):
    model = res2net_jax.create("res2net50_26w_4s", dtype=jnp.bfloat16, zero_init_last=False, **OURS).eval()
    images = images.astype("float32")
    full = res2net_jax.create("res2net50_26w_4s", zero_init_last=False, **OURS).eval()
    exact = res2net_jax.explain(full, images, classes=1)
    half = res2net_jax.explain(model, images, classes=1)
    assert half.dtype == exact.dtype == jnp.float32
    np.testing.assert_allclose(half, exact, rtol=0, atol=0.1 * float(exact.max()))
    fused = res2net_jax.explain(res2net_jax.fuse(full), images, classes=1)
    np.testing.assert_allclose(fused, exact, rtol=0, atol=1e-4 * float(exact.max()))


def test_within_another_program(twins, x64, images):
    model, x = twins[1], jnp.asarray(images)
    expected = res2net_jax.explain(model, x)
    within = jax.jit(lambda model, x: res2net_jax.explain(model, x))(model, x)
    np.testing.assert_allclose(within, expected, rtol=0, atol=1e-12 * float(expected.max()))
    for classes in (jnp.array(2), jnp.arange(len(x))):  # traced as well
        expected = res2net_jax.explain(model, x, classes=classes)
        traced = jax.jit(lambda model, x, classes: res2net_jax.explain(model, x, classes=classes))
        np.testing.assert_allclose(traced(model, x, classes), expected, rtol=0, atol=1e-12 * float(expected.max()))
    assert not traced(model, x, jnp.full(len(x), model.num_classes)).any()


@pytest.mark.parametrize("classes", [None, 1, np.zeros((0, 2), int)])
def test_no_images_have_no_maps(classes):
    model = res2net_jax.create("res2net50_26w_4s", layers=(1,), channels=(8,), num_classes=4).eval()
    assert len(res2net_jax.explain(model, jnp.zeros((0, 32, 32, 3)), classes=classes)) == 0


@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
def test_of_no_evidence_the_map_is_zero(images, method):
    model = res2net_jax.create("res2net50_26w_4s", **OURS).eval()
    model.fc.kernel.set_value(jnp.zeros_like(model.fc.kernel[...]))
    maps = res2net_jax.explain(model, images.astype("float32"), classes=1, method=method)
    assert (np.asarray(maps) == 0).all()


def test_what_cannot_be_explained(images):
    model = res2net_jax.create("res2net50_26w_4s", layers=(1,), channels=(8,), num_classes=4)
    images = jnp.asarray(images, "float32")
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        res2net_jax.explain(model, images)
    model.eval()
    with pytest.raises(ValueError, match="no stage 'layer4'; this model has act1, layer1"):
        res2net_jax.explain(model, images, stage="layer4")
    with pytest.raises(ValueError, match=r"no method 'cam'; choose gradcam or gradcam\+\+"):
        res2net_jax.explain(model, images, method="cam")
    for classes, wrong in ((4, 4), ([0, -1, 2], -1), ([[0, 1], [2, 3], [3, 9]], 9)):
        with pytest.raises(ValueError, match=f"no class {wrong}; this model has 4, from 0 to 3"):
            res2net_jax.explain(model, images, classes=classes)
    for classes in ([0, 1], [[0], [1]], np.zeros((3, 1, 1), int), []):
        with pytest.raises((ValueError, TypeError), match="expected one class|whole numbers"):
            res2net_jax.explain(model, images, classes=classes)
    with pytest.raises(TypeError, match="whole numbers; got float64"):
        res2net_jax.explain(model, images, classes=1.0)
    with pytest.raises(ValueError, match="for a single image pass"):
        res2net_jax.explain(model, images[0])
    model.reset_classifier(0)
    with pytest.raises(ValueError, match="no classifier"):
        res2net_jax.explain(model, images)
    assert "explain" in res2net_jax.__all__
