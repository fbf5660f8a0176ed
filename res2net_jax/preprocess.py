"""Pictures to arrays, exactly as the published accuracies were measured.

PIL does the resizing: ``jax.image.resize`` differs from it by up to a grey level.
"""

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageOps

from res2net_jax.arch import natural
from res2net_jax.variants import Preprocessing, Variant, get_variant

Picture = str | os.PathLike | bytes | bytearray | Image.Image

#: What the name of a picture in a folder ends in, in any case; a file that is named itself may end as it likes.
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


def preprocess(
    name_or_setting: str | Variant | Preprocessing, *, size: int | None = None
) -> Callable[[Picture], Float[np.ndarray, "h w c"]]:
    """The evaluation transform of a model; equal to timm's, value for value.

    The shorter side is resized to ``size / crop_pct``, the centre cropped to ``size``, the values
    scaled to [0, 1] and normalised.

    Args:
        name_or_setting: The model, or a setting of its own; one with a single mean is for grey images.
        size: Side of the square crop, by default the published one.

    Returns:
        A function from a path, the bytes of a picture file, or a PIL image to a float32 array
        [size, size, channels]. Files are turned upright by their EXIF orientation; a PIL image is taken as it is.
        It raises ValueError for a file that is no picture, FileNotFoundError for one that is not there.
    """
    setting = name_or_setting
    if not isinstance(setting, Preprocessing):
        setting = (setting if isinstance(setting, Variant) else get_variant(setting)).preprocessing
    mode = {1: "L", 3: "RGB"}[len(setting.mean)]
    size = setting.size if size is None else natural("size (in pixels)", size, least=1)

    def transform(picture: Picture) -> np.ndarray:
        return normalize(resize_and_crop(open_picture(picture).convert(mode), setting, size), setting)

    return transform


def open_picture(picture: Picture) -> Image.Image:
    """An upright RGB image; any mode PIL reads (grey, palette, CMYK, RGBA, 16-bit) is converted."""
    if isinstance(picture, Image.Image):
        return _to_rgb(picture)
    if isinstance(picture, bytes | bytearray):
        name, file = "these bytes", io.BytesIO(picture)
    elif isinstance(picture, str | os.PathLike):
        name = file = Path(picture).expanduser()
        if not name.is_file():
            raise FileNotFoundError(f"there is no file {name}")
    else:
        raise TypeError(f"expected a path, bytes or a PIL image; got {type(picture).__name__}")
    try:
        with Image.open(file) as image:
            return _to_rgb(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: not a picture that can be read ({error})") from error


def resize_and_crop(image: Image.Image, setting: Preprocessing, size: int) -> Image.Image:
    """The central ``size`` x ``size`` pixels after the shorter side was resized to ``size / crop_pct``."""
    short = int(size / setting.crop_pct)
    width, height = image.size
    # torchvision truncates the longer side and rounds the offset half to even.
    if width <= height:
        width, height = short, int(short * height / width)
    else:
        width, height = int(short * width / height), short
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    image = image.resize((width, height), filters[setting.interpolation])
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def normalize(image: Image.Image, setting: Preprocessing) -> Float[np.ndarray, "h w c"]:
    """(value / 255 - mean) / std in float32."""
    values = np.asarray(image, np.float32).reshape(image.height, image.width, -1) / np.float32(255)
    return (values - np.asarray(setting.mean, np.float32)) / np.asarray(setting.std, np.float32)


def _to_rgb(image):
    if image.mode.startswith("I;16"):  # 16-bit grey; PIL's own conversion would clip it to white
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")
