import io
import os
import struct
import sys
import threading

import numpy as np
import pytest
import timm.data
from PIL import Image, ImageOps

import res2net_jax
from res2net_jax import get_variant, preprocess
from res2net_jax.preprocess import open_picture, resize_and_crop
from res2net_jax.variants import Preprocessing
from train.transforms import open_picture as open_to_train


@pytest.fixture(scope="module")
def theirs():
    settings = get_variant("res2net50_26w_4s").preprocessing
    transform = timm.data.create_transform(
        input_size=(3, 224, 224),
        crop_pct=settings.crop_pct,
        interpolation=settings.interpolation,
        mean=settings.mean,
        std=settings.std,
    )
    return lambda image: transform(image.convert("RGB")).numpy().transpose(1, 2, 0)


ours = preprocess("res2net50_26w_4s")


def test_floats_from_0_to_1_are_scaled(tmp_path):
    grey = np.linspace(0, 1, 240 * 250, dtype="float32").reshape(240, 250)
    Image.fromarray(grey).save(tmp_path / "float.tiff")
    Image.fromarray(grey * 255).save(tmp_path / "to255.tiff")
    Image.fromarray(np.round(grey * 255).astype("uint8")).save(tmp_path / "grey.png")
    assert np.array_equal(ours(tmp_path / "float.tiff"), ours(tmp_path / "grey.png"))
    assert ours(tmp_path / "to255.tiff").max() > 2


def test_photographs_equal_timm(photos, theirs):
    for file in photos:
        expected = theirs(Image.open(file))
        assert np.array_equal(ours(file), expected)
        assert np.array_equal(ours(str(file)), expected)
        assert np.array_equal(ours(file.read_bytes()), expected)
        assert np.array_equal(ours(Image.open(file)), expected)
        assert ours(file).dtype == np.float32


@pytest.mark.parametrize(
    "size", [(224, 224), (225, 500), (501, 333), (30, 40), (1, 7), (256, 256), (1000, 257), (257, 255)]
)
def test_any_size_equals_timm(size, photos, theirs):
    image = Image.open(photos[0]).resize(size)
    assert np.array_equal(ours(image), theirs(image))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "1", "YCbCr"])
def test_any_mode_equals_timm(mode, photos, theirs):
    image = Image.open(photos[1]).convert(mode)
    assert np.array_equal(ours(image), theirs(image))


def test_another_size(photos):
    transform = preprocess("res2net50_26w_4s", size=288)
    reference = timm.data.create_transform(input_size=(3, 288, 288), crop_pct=0.875, interpolation="bilinear")
    expected = reference(Image.open(photos[0])).numpy().transpose(1, 2, 0)
    assert np.array_equal(transform(photos[0]), expected)
    with pytest.raises(ValueError, match="whole number from 1 up"):
        preprocess("res2net50_26w_4s", size=0)


@pytest.mark.parametrize("crop_pct", [1.0, 1.01, 1.02, 1.05, 2.0])
def test_a_crop_that_is_larger_than_the_picture_equals_timm(crop_pct, photos):
    setting = Preprocessing(size=225, crop_pct=crop_pct)
    reference = timm.data.create_transform(input_size=(3, 225, 225), crop_pct=crop_pct, interpolation="bilinear")
    for size in ((300, 400), (401, 300), (77, 77), (225, 226)):
        image = Image.open(photos[0]).resize(size)
        assert np.array_equal(preprocess(setting)(image), reference(image).numpy().transpose(1, 2, 0))


def test_a_model_knows_how_its_pictures_are_prepared(photos):
    small = {"layers": (1,), "channels": (16,)}
    model = res2net_jax.create("res2net50_26w_4s", **small)
    assert np.array_equal(preprocess(model)(photos[0]), ours(photos[0]))
    own = Preprocessing(size=32, mean=(0.5,) * 3)
    model.preprocessing = own
    assert np.array_equal(preprocess(model)(photos[0]), preprocess(own)(photos[0]))
    pyramid = res2net_jax.create("res2net50_26w_4s", features_only=True, **small)
    pyramid.backbone.preprocessing = own
    assert np.array_equal(preprocess(pyramid)(photos[0]), preprocess(own)(photos[0]))
    with pytest.raises(ValueError, match="with 5 input channels has no transform"):
        preprocess(res2net_jax.create("res2net50_26w_4s", in_chans=5, **small))
    with pytest.raises(ValueError, match="expected the name of a model, such as .*; got a dict"):
        preprocess({})


def test_a_file_is_turned_upright(photos):
    upright = Image.open(photos[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    file = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    assert np.array_equal(ours(file.getvalue()), ours(upright))


def test_a_pipe_is_read_like_a_file(photos, tmp_path):
    """As of ``predict MODEL <(curl ...)``."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(photos[0].read_bytes()), daemon=True)
    writer.start()
    assert np.array_equal(ours(tmp_path / "pipe"), ours(photos[0]))


@pytest.mark.parametrize(("form", "options"), [("JPEG", {"dpi": (72, 72)}), ("PNG", {}), ("WEBP", {"lossless": True})])
@pytest.mark.parametrize("exif", [bytes(16), b"Unknown", b"II*\0", b"II*\0\xff\0\0\0"])
def test_what_is_no_exif_is_passed_over(photos, exif, form, options):
    file = io.BytesIO()
    Image.open(photos[0]).resize((64, 40)).save(file, form, exif=b"Exif\0\0" + exif, **options)
    expected = np.asarray(Image.open(file).convert("RGB"))
    assert np.array_equal(np.asarray(open_picture(file.getvalue())), expected)
    assert np.array_equal(np.asarray(open_to_train(file.getvalue(), upright=True).convert("RGB")), expected)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_pillow_s(photos, orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.open(photos[0]).resize((64, 40)).save(file, form, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(file)))
    assert np.array_equal(np.asarray(open_picture(file.getvalue())), expected)
    assert np.array_equal(np.asarray(open_to_train(file.getvalue(), upright=True).convert("RGB")), expected)


def test_odd_exif_does_no_harm(photos):
    def directory(*entries):
        return struct.pack("<H", len(entries)) + b"".join(entries) + b"\0" * 4

    to_be_turned = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    unit_as_text = struct.pack("<HHI4s", 0x0128, 2, 2, b"2")
    file, image = io.BytesIO(), Image.open(photos[0])
    image.save(file, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + directory(to_be_turned, unit_as_text), quality=100)
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(file))
    assert open_picture(file.getvalue()).size == image.size[::-1]


@pytest.mark.parametrize("form", ["PNG", "PPM"])
@pytest.mark.parametrize("levels", [256, 1])
def test_16_bit_grey_is_not_clipped(form, levels):
    ramp = np.arange(0, 256 * levels, levels, dtype=np.uint16)  # to white, or so dark that it is black
    file = io.BytesIO()
    Image.fromarray(np.tile(ramp, (8, 1))).save(file, form)
    assert np.array_equal(np.asarray(open_picture(file.getvalue()))[0, :, 0], ramp >> 8)


@pytest.mark.parametrize("size", [(1, 3000), (5000, 3)])
def test_of_a_strip_only_what_is_seen_is_resized(size, monkeypatch):
    rng = np.random.default_rng(0)
    strip = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
    setting = get_variant("res2net50_26w_4s").preprocessing
    expected = np.asarray(resize_and_crop(strip, setting, 224), int)
    monkeypatch.setattr(sys.modules[resize_and_crop.__module__], "_MOST_PIXELS", 1000)
    resize, sizes = Image.Image.resize, []
    monkeypatch.setattr(
        Image.Image, "resize", lambda image, size, *a, **k: sizes.append(size) or resize(image, size, *a, **k)
    )
    assert np.abs(np.asarray(resize_and_crop(strip, setting, 224), int) - expected).max() <= 1
    assert sizes == [(224, 224)]


def test_a_strip_that_is_padded_to_the_crop_equals_timm(photos, monkeypatch):
    monkeypatch.setattr(sys.modules[resize_and_crop.__module__], "_MOST_PIXELS", 1000)
    setting = Preprocessing(size=224, crop_pct=2.0)
    reference = timm.data.create_transform(input_size=(3, 224, 224), crop_pct=2.0, interpolation="bilinear")
    for size in ((3, 300), (400, 5)):
        strip = Image.open(photos[0]).resize(size)
        assert np.array_equal(preprocess(setting)(strip), reference(strip).numpy().transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interpolation": "lanczos"}, "interpolation must be"),
        ({"mean": (0.5,)}, "one value per channel"),
        ({"std": (1.0, 0.0, 1.0)}, "above 0, are one value per channel"),
        ({"crop_pct": 0}, "is above 0; got 0"),
        ({"size": 224.0}, "size .* must be a whole number"),
    ],
)
def test_settings_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**options)


def test_a_setting_for_other_than_pictures():
    with pytest.raises(ValueError, match="a picture has 1 or 3 channels; this setting has a mean of 4"):
        preprocess(Preprocessing(mean=[0.5] * 4, std=[0.5] * 4))


def test_what_is_no_picture(tmp_path, photos):
    text = tmp_path / "notes.jpg"
    text.write_text("not a picture")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(photos[0].read_bytes()[:5000])
    for file in (text, cut):
        with pytest.raises(ValueError, match=f"{file.name}: not a picture that can be read"):
            ours(file)
    with pytest.raises(ValueError, match="these bytes"):
        ours(b"")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        ours(tmp_path / "none.jpg")
    with pytest.raises(TypeError, match="path, bytes, a PIL image or an array"):
        ours(3)
