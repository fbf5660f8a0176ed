"""Host-side picture operations, bit for bit against torchvision with the same random numbers."""

import io

import numpy as np
import pytest
import torch
import torchvision.transforms as tv
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms import autoaugment

from train import transforms


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(load_sample_images().images[0])  # 640 x 427


def jpeg(picture, **options):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95, **options)
    return file.getvalue()


class TorchNumbers:
    """torch's random numbers behind numpy's interface."""

    def uniform(self, low, high):
        return torch.empty(1).uniform_(low, high).item()

    def integers(self, low, high):
        return torch.randint(low, high, (1,)).item()


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (64, 900), (900, 64), (1, 1), (8, 8)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0)])
def test_crop_boxes_are_those_of_torchvision(size, scale):
    ratio = (3 / 4, 4 / 3)
    picture = Image.new("RGB", size)
    for seed in range(100):
        torch.manual_seed(seed)
        top, left, height, width = tv.RandomResizedCrop.get_params(picture, list(scale), list(ratio))
        torch.manual_seed(seed)
        box = transforms.random_resized_crop_box(TorchNumbers(), *size, scale, ratio)
        assert box == (left, top, left + width, top + height)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crop_and_resize_is_that_of_torchvision_without_scaled_decoding(photo, interpolation):
    data = jpeg(photo)
    box = (37, 21, 37 + 301, 21 + 333)
    ours = transforms.crop_and_resize(transforms.open_picture(data), box, 224, interpolation, 3)
    crop = tv.functional.resized_crop(
        Image.open(io.BytesIO(data)), 21, 37, 333, 301, [224, 224], tv.InterpolationMode(interpolation)
    )
    assert np.array_equal(np.asarray(ours), np.asarray(crop))


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("size", [32, 100, 224, 400])  # 32 and 100 decode at a smaller scale, 400 enlarges
def test_the_simd_resizer_is_at_most_one_grey_level_from_pillow(photo, size, in_chans):
    pytest.importorskip("cykooz_resizer")
    data, box = jpeg(photo), (37, 21, 37 + 301, 21 + 333)
    pillow, simd = (
        np.asarray(
            transforms.crop_and_resize(transforms.open_picture(data), box, size, "bilinear", in_chans, name), int
        )
        for name in transforms.RESIZERS
    )
    assert pillow.shape == simd.shape and np.abs(pillow - simd).max() == 1
    assert np.mean(pillow != simd) < 0.2


@pytest.mark.parametrize("size", [20, 33, 50, 68, 100, 136])
def test_scaled_decoding_differs_less_than_another_filter_would(photo, size):
    data = jpeg(photo)
    box = (13, 9, 13 + 611, 9 + 411)
    opened = transforms.open_picture(data)
    scaled = np.asarray(transforms.crop_and_resize(opened, box, size, "bilinear", 3), int)
    crop = Image.open(io.BytesIO(data)).convert("RGB").crop(box)
    full = np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR), int)
    other = np.asarray(crop.resize((size, size), Image.Resampling.HAMMING), int)
    assert opened.size[0] < photo.size[0], "the rule should allow a smaller decode here"
    assert np.abs(scaled - full).mean() < np.abs(other - full).mean()


def test_scaled_decoding_leaves_half_as_many_pixels_again_as_needed(photo):
    # The shorter side decides, wherever the box lies.
    for box, size in (((0, 0, 400, 300), 101), ((0, 127, 640, 427), 101), ((340, 0, 640, 427), 101)):
        opened = transforms.open_picture(jpeg(photo))
        transforms.crop_and_resize(opened, box, size, "bilinear", 3)
        assert opened.size == photo.size
    opened = transforms.open_picture(jpeg(photo))
    transforms.crop_and_resize(opened, (0, 0, 400, 300), 100, "bilinear", 3)
    assert opened.size == (320, 214)


def test_scaled_decoding_of_the_smallest_pictures():
    for width in range(1, 110):  # up to where a size of 8 still asks for an eighth of the scale
        data = jpeg(Image.new("RGB", (width, width + 5), (90, 90, 90)))
        for size in (1, 2, 5, 8):
            picture = transforms.crop_and_resize(
                transforms.open_picture(data), (0, 0, width, width + 5), size, "bilinear", 3
            )
            assert picture.size == (size, size) and set(np.asarray(picture).ravel()) == {90}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_rand_augment_operations_are_those_of_torchvision(photo, mode, magnitude):
    picture = photo.resize((224, 200)).convert(mode)
    space = autoaugment.RandAugment()._augmentation_space(31, (200, 224))
    assert set(space) == set(transforms.OPERATIONS)
    for name, (magnitudes, signed) in space.items():
        value = float(magnitudes[magnitude]) if magnitudes.ndim else 0.0
        for sign in (1, -1) if signed else (1,):
            expected = autoaugment._apply_op(picture, name, sign * value, tv.InterpolationMode.NEAREST, None)
            ours = transforms.distort(picture, name, magnitude, sign)
            assert np.array_equal(np.asarray(ours), np.asarray(expected)), (name, sign)


def test_rand_augment_draws_every_operation():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    results = {transforms.rand_augment(np.random.default_rng(i), picture, 9).tobytes() for i in range(300)}
    assert len(results) > 150  # of 14 * 14 pairs, most with two signs each


def test_color_jitter_is_that_of_torchvision(photo):
    picture = photo.resize((120, 90))

    class Numbers:
        def permutation(self, n):
            return [2, 0, 1]

        def uniform(self, low, high):
            assert (low, high) == (0.6, 1.4)
            return factors.pop(0)

    factors = [1.3, 0.7, 1.1]
    ours = transforms.color_jitter(Numbers(), picture, 0.4)
    expected = tv.functional.adjust_saturation(picture, 1.3)
    expected = tv.functional.adjust_brightness(expected, 0.7)
    expected = tv.functional.adjust_contrast(expected, 1.1)
    assert np.array_equal(np.asarray(ours), np.asarray(expected))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1"])
def test_all_colour_modes_are_decoded(photo, mode):
    file = io.BytesIO()
    photo.resize((40, 30)).convert(mode).save(file, "JPEG" if mode == "CMYK" else "PNG")
    for channels, expected in ((3, "RGB"), (1, "L")):
        assert transforms.decode(transforms.open_picture(file.getvalue()), channels).mode == expected


@pytest.mark.parametrize("damage", ["empty", "text", "header", "cut"])
def test_damaged_pictures_are_unreadable(photo, damage):
    whole = jpeg(photo)
    data = {"empty": b"", "text": b"<html>not found</html>", "header": whole[:20], "cut": whole[: len(whole) // 2]}
    with pytest.raises(transforms.UnreadablePicture):
        transforms.decode(transforms.open_picture(data[damage]), 3)
