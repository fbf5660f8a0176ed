import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

import porting
import res2net_jax
from res2net_jax.inference import imagenet_classes, likeliest

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.fixture(scope="module")
def model(checkpoint_folder):
    return res2net_jax.load(checkpoint_folder)


def test_classify_equals_timm(model, photos, timm_model):
    import timm.data

    reference = timm_model("res2net50_48w_2s")
    transform = timm.data.create_transform(input_size=(3, 224, 224), crop_pct=0.875, interpolation="bilinear")
    with torch.inference_mode():
        batch = torch.stack([transform(Image.open(file)) for file in photos])
        probabilities, indices = reference(batch).softmax(-1).topk(5)
    for answer, p, i in zip(res2net_jax.classify(model, photos), probabilities, indices, strict=True):
        assert [prediction.index for prediction in answer] == i.tolist()
        assert np.allclose([prediction.probability for prediction in answer], p, rtol=1e-4)
        assert answer[0].label == imagenet_classes()[i[0]][1]


def test_one_or_many_pictures_in_any_form(model, photos):
    many = res2net_jax.classify(model, [*photos, *photos, photos[1]], 3, batch_size=2)
    assert [len(answer) for answer in many] == [3] * 5
    one = res2net_jax.classify(model, photos[1], 3)
    assert isinstance(one[0], res2net_jax.Prediction)
    assert [p.index for p in one] == [p.index for p in many[1]] == [p.index for p in many[4]]
    array = np.stack([res2net_jax.preprocess(model.name)(file) for file in photos])
    assert res2net_jax.classify(model, array, 1)[1][0].label == one[0].label
    assert res2net_jax.classify(model, photos[1].read_bytes(), 1)[0].label == one[0].label
    pixels = np.asarray(Image.open(photos[1]))
    for form in (pixels, jnp.asarray(pixels)):
        assert res2net_jax.classify(model, form, 3) == one
    for several in (np.stack([pixels, pixels]), [photos[0], pixels]):
        assert [p.index for p in res2net_jax.classify(model, several, 3)[1]] == [p.index for p in one]
    grey = pixels[:, :, 0]
    assert res2net_jax.classify(model, grey) == res2net_jax.classify(model, grey[:, :, None])
    assert res2net_jax.classify(model, grey) == res2net_jax.classify(model, Image.fromarray(grey))


def test_class_names_and_their_number(photos, model):
    names = imagenet_classes()
    assert len(names) == 1000 == len({label for _, label in names})
    assert names[0] == ("n01440764", "tench, Tinca tinca") and names[999][0] == "n15075141"
    small = res2net_jax.create("res2net50_26w_4s", layers=(1,), channels=(16,), num_classes=3).eval()
    assert {p.label for p in res2net_jax.classify(small, photos[0])} == {"class 0", "class 1", "class 2"}
    small.reset_classifier(2, class_names=["cat", "dog"])
    assert {p.label for p in res2net_jax.classify(small, photos[0])} == {"cat", "dog"}
    small.class_names = ["lynx", "wolf"]
    assert {p.label for p in res2net_jax.classify(small, photos[0])} == {"lynx", "wolf"}
    for wrong in ("ab", ["a"], ["a", "b", "c"]):
        with pytest.raises(ValueError, match="class_names must be 2 names"):
            small.class_names = wrong
    assert small.class_names == ("lynx", "wolf")


def test_probabilities_of_bfloat16_logits_are_float32():
    logits = np.array([1.0, 2.0, 3.015625])  # exact in bfloat16
    expected = np.exp(logits) / np.exp(logits).sum()
    (answers,) = likeliest(jnp.asarray(logits[None], "bfloat16"), "abc", 3)
    np.testing.assert_allclose([answer.probability for answer in answers[::-1]], expected, rtol=1e-6)


def test_an_array_that_is_not_normalised_gets_a_warning(model):
    with pytest.warns(UserWarning, match="values up to 255.* pass pictures of 0 to 255 as uint8"):
        res2net_jax.classify(model, np.full((1, 64, 64, 3), 255.0, "float32"))


def test_what_cannot_be_classified(model, photos, tmp_path):
    with pytest.raises(ValueError, match="no images"):
        res2net_jax.classify(model, [])
    with pytest.raises(ValueError, match="top_k"):
        res2net_jax.classify(model, photos, 0)
    with pytest.raises(FileNotFoundError):
        res2net_jax.classify(model, tmp_path / "none.jpg")
    fresh = res2net_jax.create("res2net50_26w_4s", layers=(1,), channels=(16,))
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        res2net_jax.classify(fresh, photos)
    for names in (["a"], "ab", ["a", "b", "c"]):
        with pytest.raises(ValueError, match="class_names must be 2 names"):
            fresh.reset_classifier(2, class_names=names)
    with pytest.raises(TypeError, match="a list of pictures, or an array"):
        res2net_jax.classify(model, 3)
    with pytest.raises(ValueError, match="batch_size"):
        res2net_jax.classify(model, photos, batch_size=0)
    grey = res2net_jax.create("res2net50_26w_4s", layers=(1,), channels=(16,), in_chans=1).eval()
    with pytest.raises(ValueError, match="1 input channels has no transform for pictures"):
        res2net_jax.classify(grey, photos)
    for shape in ((2, 3, 64, 64), (3, 64, 64), (8, 8, 4), (0, 8, 3)):
        pixels = np.zeros(shape, "uint8")
        with pytest.raises(ValueError, match=r"a picture as an array is uint8, \[height, width, 3\] .*; got uint8 \["):
            res2net_jax.classify(model, pixels)
    with pytest.raises(ValueError, match="a picture as an array is uint8, .*; got float32"):
        res2net_jax.classify(model, [np.zeros((8, 8, 3), "float32")])
    with pytest.raises(ValueError, match="looks like NCHW"):
        res2net_jax.classify(model, np.zeros((1, 3, 64, 64), "float32"))
    fresh.reset_classifier(0)
    with pytest.raises(ValueError, match="no classifier"):
        res2net_jax.classify(fresh.eval(), photos)


def test_class_names_survive_the_checkpoint(tmp_path):
    small = res2net_jax.create("res2net50_26w_4s", layers=(1,), channels=(16,), num_classes=10)
    small.reset_classifier(2, class_names=["chat écaille", "dog"])
    loaded = res2net_jax.load(res2net_jax.save(small, tmp_path / "m"))
    assert loaded.class_names == ("chat écaille", "dog")
    assert porting.state_dict(loaded)["fc.weight"].shape == (2, 64)
