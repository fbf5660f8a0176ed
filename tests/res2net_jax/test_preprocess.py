import io

import numpy as np
import pytest
import timm.data
from PIL import Image

from res2net_jax import get_variant, preprocess
from res2net_jax.preprocess import open_picture


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


def test_a_file_is_turned_upright(photos):
    upright = Image.open(photos[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    file = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    assert np.array_equal(ours(file.getvalue()), ours(upright))


def test_16_bit_grey_is_not_clipped():
    ramp = np.arange(0, 65536, 256, dtype=np.uint16)
    file = io.BytesIO()
    Image.fromarray(np.tile(ramp, (8, 1))).save(file, "PNG")
    assert np.array_equal(np.asarray(open_picture(file.getvalue()))[0, :, 0], np.arange(256))


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
    with pytest.raises(TypeError, match="path, bytes or a PIL image"):
        ours(3)
