"""Pictures to arrays, exactly as the published accuracies were measured.

PIL does the resizing: ``jax.image.resize`` differs from it by up to a grey level.
"""

import io
import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float
from PIL import ExifTags, Image, UnidentifiedImageError

from res2net_jax.checks import natural
from res2net_jax.features import FeaturePyramid, backbone_of
from res2net_jax.files import first_line
from res2net_jax.model import Res2Net
from res2net_jax.variants import VARIANTS, Preprocessing, Variant, get_variant

_MODES = {1: "L", 3: "RGB"}
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_MOST_PIXELS = 2**25  # of a picture whose shorter side is resized: 128 MB, more than one of 256 x 100,000

# An array is uint8, [h, w], [h, w, 1] or [h, w, 3].
Picture = str | os.PathLike | bytes | bytearray | Image.Image | np.ndarray | jax.Array

#: EXIF's orientation -> what sets the picture right.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def preprocess(
    model: str | Res2Net | FeaturePyramid | Variant | Preprocessing, *, size: int | None = None
) -> Callable[[Picture], Float[np.ndarray, "h w c"]]:
    """The evaluation transform of a model; equal to timm's, value for value.

    The shorter side is resized to ``size / crop_pct``, the centre cropped to ``size``, the values
    scaled to [0, 1] and normalised. Of strips some 400 times as long as wide, which are resized in parts, a value may
    be one grey level from timm's. Grey pictures of 16 bits or of floats from 0 to 1, which timm clips to white or to
    black, are scaled.

    Args:
        model: A model, which may have been trained on pictures of its own; the name of one; or a setting, which is
            for grey images if it has a single mean.
        size: Side of the square crop, by default the model's.

    Returns:
        A function from a path, the bytes of a picture file, a PIL image, or RGB or grey values in uint8 [h, w, 3] or
        [h, w] to a float32 array [size, size, channels]. Files are turned upright by their EXIF orientation; other
        pictures are taken as they are. It raises ValueError for a file that is not a picture, FileNotFoundError for one
        that is not there.

    Raises:
        ValueError: No model is called so, or how pictures become its images is not known.
    """
    if isinstance(model, Preprocessing):
        setting = model
    elif isinstance(model, Res2Net | FeaturePyramid):
        setting = picture_setting(backbone_of(model))
    else:
        setting = (model if isinstance(model, Variant) else get_variant(model)).preprocessing
    if len(setting.mean) not in _MODES:
        raise ValueError(f"a picture has 1 or 3 channels; this setting has a mean of {len(setting.mean)}")
    mode = _MODES[len(setting.mean)]
    size = setting.size if size is None else natural("size (in pixels)", size, least=1)

    def transform(picture: Picture) -> np.ndarray:
        return normalize(resize_and_crop(open_picture(picture).convert(mode), setting, size), setting)

    return transform


def picture_setting(model: Res2Net) -> Preprocessing:
    """How pictures become the images that ``model`` takes; for :func:`preprocess`.

    Raises:
        ValueError: It is not known, or for another number of channels.
    """
    setting = known_setting(model)
    if setting is None or model.in_chans not in _MODES:
        raise ValueError(
            f"{model.name} with {model.in_chans} input channels has no transform for pictures; pass an array "
            "[batch, height, width, channels] that is normalised as in its training, or set model.preprocessing to a "
            "res2net_jax.Preprocessing with one mean per channel"
        )
    return setting


def known_setting(model: Res2Net) -> Preprocessing | None:
    """As :func:`picture_setting`, but None where it is not known."""
    setting = model.preprocessing
    if setting is None and model.name in VARIANTS:
        setting = VARIANTS[model.name].preprocessing
    return setting if setting is not None and len(setting.mean) == model.in_chans else None


def open_picture(picture: Picture) -> Image.Image:
    """An upright RGB image; any mode PIL reads (grey, palette, CMYK, RGBA, 16-bit, floats from 0 to 1) is converted."""
    if isinstance(picture, Image.Image):
        return _to_rgb(picture)
    if isinstance(picture, bytes | bytearray):
        name, file = "these bytes", io.BytesIO(picture)
    elif isinstance(picture, str | os.PathLike):
        name = file = Path(picture).expanduser()
        if name.is_dir():
            raise ValueError(f"{name} is a folder; give its pictures one by one")
        if not (name.is_file() or name.is_fifo()):
            raise FileNotFoundError(f"there is no file {name}")
    elif isinstance(picture, np.ndarray | jax.Array):
        return _from_array(np.asarray(picture))
    else:
        raise TypeError(f"expected a path, bytes, a PIL image or an array; got {type(picture).__name__}")
    try:
        with Image.open(file) as image:
            return _to_rgb(upright(image))
    except UnidentifiedImageError as error:  # whose own text names the file once more
        raise ValueError(f"{name}: not a picture that can be read (it is in no known format)") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file raises whatever its format's parser stumbles on
        raise ValueError(f"{name}: not a picture that can be read ({first_line(error)})") from error


def upright(image: Image.Image) -> Image.Image:
    """``image`` turned as its EXIF data say."""
    # Pillow's exif_transpose also writes the data anew, and fails where they are odd. A TIFF turns itself when loaded.
    if _orientation(image) == 1:
        return image
    image.load()
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image):
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:  # of what is no EXIF; the picture may be sound
        return 1


def resize_and_crop(image: Image.Image, setting: Preprocessing, size: int) -> Image.Image:
    """The central ``size`` x ``size`` pixels after the shorter side was resized to ``size / crop_pct``."""
    short = int(size / setting.crop_pct)
    width, height = image.size
    # torchvision truncates the longer side, rounds the offset half to even, and pads what is smaller before it crops.
    if width <= height:
        width, height = short, int(short * height / width)
    else:
        width, height = int(short * width / height), short
    left, top = (round((side - size) / 2) if side >= size else -((size - side) // 2) for side in (width, height))
    box = (left, top, left + size, top + size)
    if width * height > _MOST_PIXELS and min(box) >= 0:  # a strip; what is cropped in any case is not computed then
        across, down = image.width / width, image.height / height
        part = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
        return image.resize((size, size), _FILTERS[setting.interpolation], box=part)
    return image.resize((width, height), _FILTERS[setting.interpolation]).crop(box)


def normalize(image: Image.Image, setting: Preprocessing) -> Float[np.ndarray, "h w c"]:
    """(value / 255 - mean) / std in float32."""
    values = np.asarray(image, np.float32).reshape(image.height, image.width, -1) / np.float32(255)
    return (values - np.asarray(setting.mean, np.float32)) / np.asarray(setting.std, np.float32)


def _from_array(values):
    kind = values.dtype == np.uint8 and values.ndim in (2, 3) and values.shape[2:] in ((), (1,), (3,))
    if not kind or values.size == 0:
        raise ValueError(
            f"a picture as an array is uint8, [height, width, 3] or [height, width]; got {values.dtype} "
            f"{list(values.shape)}"
        )
    return Image.fromarray(values.reshape(values.shape[:2]) if values.shape[2:] == (1,) else values).convert("RGB")


def _to_rgb(image):
    # 16-bit grey, in mode I if it is a PGM, which has no EXIF data; PIL's own conversion would clip it to white.
    if image.mode.startswith("I;16") or image.mode == "I" and (image.format == "PPM" or np.max(image, initial=0) > 255):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "F" and np.min(image, initial=0) >= 0 and np.max(image, initial=0) <= 1:  # scikit-image's floats
        image = Image.fromarray(np.round(np.asarray(image) * 255).astype(np.uint8))
    return image.convert("RGB")
