"""A map of :func:`res2net_jax.explain` in colour over its picture."""

import numpy as np
from jaxtyping import Float
from PIL import Image

# The colour map magma (CC0), whose lightness grows evenly; linear between these points, which is within 3 of 255.
_MAGMA = (
    "000004 0a0822 1d1146 36106a 50127c 691c81 822681 9c2e7f b63779 cf4170 e65163 f5695c fb8761 fea571 fec387 fde0a2 "
    "fcfdbf"
)


def overlay(picture: Image.Image, heat: Float[np.ndarray, "h w"], alpha: float = 0.6) -> Image.Image:
    """``heat``, as a share of its largest value, in colour over ``picture`` in grey: from dark (nothing) to light.

    Args:
        picture: What the map is of: the part that the model saw, at any size.
        heat: A map, at least 0.
        alpha: Weight of the colour, from 0 (the grey picture alone) to 1 (the colour alone).

    Raises:
        ValueError: ``alpha`` is not in [0, 1].
    """
    check_alpha(alpha)
    heat = np.asarray(heat, np.float32)
    heat = Image.fromarray(heat / max(float(heat.max()), 1e-30)).resize(picture.size, Image.Resampling.BICUBIC)
    colours = Image.fromarray(colour(np.asarray(heat).clip(0, 1)))
    grey = picture.convert("L").convert("RGB")  # so that all colour is the map's
    return Image.blend(grey, colours, alpha)


def check_alpha(alpha: float) -> None:
    """Raises ValueError for what is no weight."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is a weight from 0 to 1; got {alpha}")


def colour(values: Float[np.ndarray, "h w"]) -> np.ndarray:
    """Values in [0, 1] as magma's colours, uint8 [h, w, 3]."""
    points = np.array([list(bytes.fromhex(point)) for point in _MAGMA.split()])
    at = np.linspace(0, 1, len(points))
    channels = [np.interp(values, at, channel) for channel in points.T]
    return np.stack(channels, -1).round().astype(np.uint8)
