"""One picture on the host: decode, crop, flip, distort. Pillow in, uint8 array out.

Crop, flip, colour jitter and RandAugment equal torchvision's (``RandomResizedCrop``, ``hflip``, ``ColorJitter``,
``RandAugment``) on Pillow pictures, bit for bit given the same random numbers (but for what :func:`crop_and_resize`
says); all randomness comes from the ``numpy.random.Generator`` passed in.
"""

import io
import math

import numpy as np
from PIL import Image, ImageEnhance, ImageOps, UnidentifiedImageError

from res2net_jax.files import first_line
from res2net_jax.preprocess import open_picture as to_rgb
from res2net_jax.preprocess import upright as turned_upright

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


class UnreadablePicture(ValueError):
    """The bytes are no picture, or a damaged one."""


def open_picture(image: bytes | np.ndarray, upright: bool = False) -> Image.Image:
    """A picture whose size is known and whose pixels are, as a rule, yet to be decoded.

    Args:
        image: The bytes of a file, or uint8 [h, w, c].
        upright: Turn the picture as its EXIF orientation says.

    Raises:
        UnreadablePicture: It is in no known format.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    try:
        picture = Image.open(io.BytesIO(image))
        return turned_upright(picture) if upright else picture
    except UnidentifiedImageError as error:
        raise UnreadablePicture("it is in no known picture format") from error
    except Exception as error:  # a damaged header raises whatever its format's parser stumbles on
        raise UnreadablePicture(first_line(error)) from error


def decode(picture: Image.Image, in_chans: int) -> Image.Image:
    """The pixels, as grey (``in_chans`` 1) or RGB (3), whatever the file's own colours.

    Raises:
        UnreadablePicture: The data is damaged or cut short.
    """
    try:
        if picture.mode == ("L" if in_chans == 1 else "RGB"):
            picture.load()  # convert would copy it
            return picture
        return picture.convert("L") if in_chans == 1 else to_rgb(picture)
    except Exception as error:
        raise UnreadablePicture(first_line(error)) from error


def random_resized_crop_box(
    rng, width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """A box (left, top, right, bottom) of random area and shape, as torchvision's RandomResizedCrop draws it.

    The area is uniform in ``scale`` of the picture's, the logarithm of width / height uniform in ``ratio``'s.
    After ten boxes that do not fit it is the largest centred one whose shape lies in ``ratio``.
    """
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < ratio[0]:
        h = round(w / ratio[0])
    elif width / height > ratio[1]:
        w = round(h * ratio[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def crop_and_resize(
    picture: Image.Image,
    box: tuple[int, int, int, int],
    size: int,
    interpolation: str,
    in_chans: int,
    resizer: str = "pillow",
) -> Image.Image:
    """Decodes ``box`` of the picture to ``size`` x ``size``, with one of :data:`RESIZERS`.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its scale where the box still covers 1.5 * ``size`` pixels each way.
    On photographs that moves values by one grey level of 255 on average, less than another filter would.
    """
    width, height = picture.size
    least = min(box[2] - box[0], box[3] - box[1])
    shrink = next((n for n in (8, 4, 2) if picture.format == "JPEG" and least >= 1.5 * n * size), 1)
    if shrink > 1:
        picture.draft(None, (width // shrink, height // shrink))
        # The decoder may decline. If not it rounds the size up: one of its pixels is exactly n x n of the file's.
        shrink = shrink if picture.size != (width, height) else 1
    pixels, resize = decode(picture, in_chans), RESIZERS[resizer]
    if shrink == 1:
        pixels = pixels.crop(box)
        return resize(pixels, size, interpolation, (0, 0, *pixels.size))
    return resize(pixels, size, interpolation, tuple(side / shrink for side in box))


def _resize_pillow(pixels, size, interpolation, box):
    return pixels.resize((size, size), RESAMPLING[interpolation], box=box)


def _resize_simd(pixels, size, interpolation, box):
    import cykooz_resizer as simd

    if interpolation != "bilinear":  # its bicubic filter is further from Pillow's
        return _resize_pillow(pixels, size, interpolation, box)
    left, top, right, bottom = box
    options = simd.ResizeOptions(
        simd.ResizeAlg.convolution(simd.FilterType.bilinear),
        crop_box=simd.CropBox(left, top, right - left, bottom - top),
    )
    resized = Image.new(pixels.mode, (size, size))
    simd.Resizer().resize_pil(pixels, resized, options)
    return resized


#: ``simd`` (cykooz.resizer) is Pillow's bilinear filter in less than half the time, some values rounded the other way.
RESIZERS = {"pillow": _resize_pillow, "simd": _resize_simd}


def horizontal_flip(picture: Image.Image) -> Image.Image:
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def color_jitter(rng, picture: Image.Image, strength: float) -> Image.Image:
    """Brightness, contrast and saturation, each by a factor in 1 +- ``strength``, in random order."""
    for i in rng.permutation(3):
        factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
        picture = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[i](picture).enhance(factor)
    return picture


def rand_augment(rng, picture: Image.Image, magnitude: int, num_ops: int = 2) -> Image.Image:
    """``num_ops`` random distortions (Cubuk et al., RandAugment, https://arxiv.org/abs/1909.13719).

    ``magnitude`` is 0..30, 9 in the paper's ImageNet setting; the operations and their ranges are torchvision's.
    """
    for _ in range(num_ops):
        name = OPERATIONS[rng.integers(len(OPERATIONS))]
        sign = 1 if rng.integers(2) else -1
        picture = distort(picture, name, magnitude, sign)
    return picture


OPERATIONS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness",
    "Color", "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip


def distort(picture: Image.Image, name: str, magnitude: int, sign: int) -> Image.Image:
    """One operation of RandAugment; uncovered corners become black."""
    part = sign * magnitude / 30
    width, height = picture.size
    match name:
        case "Identity":
            return picture
        case "ShearX":
            return _affine(picture, (1, 0.3 * part, 0, 0, 1, 0))
        case "ShearY":
            return _affine(picture, (1, 0, 0, 0.3 * part, 1, 0))
        case "TranslateX":
            return _affine(picture, (1, 0, -int(150 / 331 * width * part), 0, 1, 0))
        case "TranslateY":
            return _affine(picture, (1, 0, 0, 0, 1, -int(150 / 331 * height * part)))
        case "Rotate":
            return picture.rotate(30 * part, Image.Resampling.NEAREST)
        case "Brightness" | "Color" | "Contrast" | "Sharpness":
            return getattr(ImageEnhance, name)(picture).enhance(1 + 0.9 * part)
        case "Posterize":
            return ImageOps.posterize(picture, 8 - round(4 * abs(part)))
        case "Solarize":
            return ImageOps.solarize(picture, 255 * (1 - abs(part)))
        case "AutoContrast":
            return ImageOps.autocontrast(picture)
        case "Equalize":
            return ImageOps.equalize(picture)
    raise ValueError(f"no operation {name!r}; known are {', '.join(OPERATIONS)}")


def _affine(picture, matrix):
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)
