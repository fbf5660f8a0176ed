import numpy as np
import pytest
import torch

import porting
import res2net_jax
from porting.convert import fitting_variants
from res2net_jax import Res2Net, get_variant
from res2net_jax.init import variables


def without_counts(state_dict):
    return {key: value for key, value in state_dict.items() if not key.endswith("num_batches_tracked")}


@pytest.mark.parametrize("name", res2net_jax.VARIANTS)
def test_there_and_back_is_the_same_bit_for_bit(name, timm_model):
    given = {key: value.numpy() for key, value in timm_model(name).state_dict().items()}
    model = porting.load_state_dict(Res2Net(get_variant(name).arch), given)
    back = porting.state_dict(model)
    given = without_counts(given)
    assert back.keys() == given.keys()
    for key, value in given.items():
        assert back[key].dtype == value.dtype and back[key].flags.c_contiguous
        assert back[key].tobytes() == value.tobytes(), key


def test_torch_tensors_and_other_types_are_taken_too(weights):
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in weights.items()}
    model = res2net_jax.create("res2net50_48w_2s")
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        cast = {k: torch.nn.Parameter(v.to(dtype)) if v.is_floating_point() else v for k, v in tensors.items()}
        porting.load_state_dict(model, cast)
        assert variables(model)["conv1.kernel"].dtype == np.float32
        expected = cast["conv1.weight"].detach().float().numpy()
        assert np.array_equal(porting.state_dict(model)["conv1.weight"], expected)


def test_one_error_names_every_key_and_changes_nothing(weights):
    broken = dict(weights)
    del broken["bn1.bias"], broken["layer3.2.convs.0.weight"]
    broken["head.weight"] = broken["layer9.weight"] = np.zeros(3, "float32")
    broken["layer1.0.conv1.weight"] = broken["layer1.0.conv1.weight"][:-1]
    broken["layer2.0.bn3.running_var"] = broken["layer2.0.bn3.running_var"] * np.nan
    broken["layer4.1.bn3.weight"] = np.full(2048, 1e300)  # infinite in float32
    broken["layer4.1.bn2.running_var"] = broken.pop("layer4.1.bns.0.running_var")
    broken["layer4.0.bn1.running_var"] = -broken["layer4.0.bn1.running_var"]
    broken["fc.bias"] = np.arange(1000)
    model = res2net_jax.create("res2net50_48w_2s")
    before = porting.state_dict(model)
    with pytest.raises(ValueError) as caught:
        porting.load_state_dict(model, broken)
    message = str(caught.value)
    for line in (
        "do not fit res2net50_48w_2s (1000 classes, 3 input channels)",
        "3 missing:\n  bn1.bias\n  layer3.2.convs.0.weight\n  layer4.1.bns.0.running_var\n",
        "3 unexpected:\n  head.weight\n  layer9.weight\n  layer4.1.bn2.running_var\n",
        "1 not floating point:\n  fc.bias: int64\n",
        "1 negative variance:\n  layer4.0.bn1.running_var",
        "1 wrong shape:\n  layer1.0.conv1.weight: (95, 64, 1, 1), expected (96, 64, 1, 1)\n",
        "2 NaN or infinite:\n  layer2.0.bn3.running_var\n  layer4.1.bn3.weight",
    ):
        assert line in message, message
    after = porting.state_dict(model)
    assert all(np.array_equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("name", "options"),
    [("res2net50d", {}), ("res2next50", {"num_classes": 7}), ("res2net101_26w_4s", {"in_chans": 1})],
)
def test_the_variants_that_would_fit_are_named(name, options, timm_model):
    state_dict = {key: value.numpy() for key, value in timm_model(name, **options).state_dict().items()}
    expected = name + "".join(f" ({key}={value})" for key, value in options.items())
    assert fitting_variants(state_dict) == [expected]
    with pytest.raises(ValueError, match="They fit: " + expected.replace("(", r"\(").replace(")", r"\)")):
        porting.load_state_dict(res2net_jax.create("res2net50_26w_4s"), state_dict)
    assert fitting_variants({"fc.weight": np.zeros((10, 2048))}) == []
