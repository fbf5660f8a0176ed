import re

import pytest
import torch

import res2net_jax
from porting.convert import torch_shapes
from res2net_jax import VARIANTS, Res2Net, get_variant, list_models
from res2net_jax.cost import cost
from res2net_jax.init import variables
from res2net_jax.variants import Accuracy

RELEASED = {
    "res2net50_26w_4s": (5_499_974_064, 25_700_000),
    "res2net50_26w_6s": (8_130_156_528, 37_050_000),
    "res2net50_26w_8s": (10_760_338_992, 48_400_000),
    "res2net50_48w_2s": (5_375_291_520, 25_290_000),
    "res2net50_14w_8s": (5_403_546_768, 25_060_000),
    "res2net101_26w_4s": (10_415_881_200, 45_210_000),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_facts_equal_timm(name):
    import timm

    variant = get_variant(name)
    with torch.device("meta"):
        reference = timm.create_model(name)
    assert sum(parameter.numel() for parameter in reference.parameters()) == variant.params
    shapes = {k: tuple(v.shape) for k, v in reference.state_dict().items() if "num_batches_tracked" not in k}
    assert torch_shapes(variant.arch) == shapes
    config, setting = reference.pretrained_cfg, variant.preprocessing
    assert config["input_size"] == (3, setting.size, setting.size)
    assert (config["crop_pct"], config["interpolation"]) == (setting.crop_pct, setting.interpolation)
    assert (tuple(config["mean"]), tuple(config["std"])) == (setting.mean, setting.std)
    assert config["hf_hub_id"] == variant.hub_id


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_and_multiply_adds(name):
    variant = get_variant(name)
    model = Res2Net(variant.arch)  # in train mode: the cost is that of eval mode all the same
    arrays = variables(model).items()
    assert sum(v.get_value().size for k, v in arrays if not k.endswith(("mean", "var"))) == variant.params
    assert cost(model).macs == variant.macs
    model.set_grad_checkpointing()
    assert cost(model).macs == variant.macs


@pytest.mark.parametrize("name", RELEASED)
def test_published_flops(name):
    flops, parameters = RELEASED[name]
    published = get_variant(name).published
    assert (published.flops, published.parameters) == (flops, parameters)
    assert cost(Res2Net(get_variant(name).arch).eval(), 224, 285).flops == flops


@pytest.mark.parametrize("name", ["res2next50", "res2net50d"])
def test_multiply_adds_equal_torch_hooks_at_an_odd_size(name):
    import timm

    total = 0

    def count(module, inputs, output):
        nonlocal total
        per_output = module.weight.numel() // module.weight.shape[0]
        total += output.numel() * per_output

    reference = timm.create_model(name).eval()
    for module in reference.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    with torch.inference_mode():
        reference(torch.zeros(1, 3, 97, 131))
    assert cost(Res2Net(get_variant(name).arch).eval(), 97, 131).macs == total


def test_names():
    assert list_models() == list(VARIANTS) and len(VARIANTS) == 9
    assert list_models("*101*") == ["res2net101_26w_4s", "res2net101d"]
    assert list_models("vgg*") == [] and list_models("") == list_models()
    assert list_models(["*50d", "*101*"]) == ["res2net101_26w_4s", "res2net50d", "res2net101d"]
    with pytest.raises(ValueError, match="no model is called 'res2net50_14w8s'; did you mean res2net50_14w_8s"):
        res2net_jax.create("res2net50_14w8s")
    with pytest.raises(ValueError, match="known models: res2net50_26w_4s"):
        res2net_jax.load("zzz")


def test_published_facts_hang_together():
    for name, variant in VARIANTS.items():
        assert variant.name == name and variant.hub_id == f"timm/{name}.in1k"
        assert variant.url.endswith("/" + variant.pth) and re.search(r"-[0-9a-f]{8}\.pth$", variant.pth)
        fields = ("imagenet", "imagenet_real", "imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch")
        for accuracy in (getattr(variant, field) for field in fields):
            assert 0 < accuracy.top1 < accuracy.top5 < 100
        assert variant.imagenet_real.top1 > variant.imagenet.top1 > variant.imagenet_v2.top1 > variant.imagenet_a.top1
        if variant.published:
            assert variant.published.parameters == pytest.approx(variant.params, abs=5000)
            assert abs(variant.published.top1 - variant.imagenet.top1) < 0.3
            # four bytes a parameter and a running statistic, and torch's own overhead
            assert variant.published.file_size == pytest.approx(4 * variant.params, rel=0.02)
            assert variant.recipe.epochs == 100 and variant.recipe.lr == 0.1
    assert VARIANTS["res2net50_14w_8s"].imagenet == Accuracy(78.142, 93.852)
