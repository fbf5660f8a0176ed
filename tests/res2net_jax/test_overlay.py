"""Heat over pictures, and the names that `explain` gives and takes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from res2net_jax.commands.explain import find_class, png_names
from res2net_jax.inference import imagenet_classes
from res2net_jax.overlay import colour, overlay


def test_names_of_pngs():
    names = png_names([Path("/p/a/x.jpg"), Path("/p/a/x.png"), Path("/p/q/../b.c.jpg"), Path("/p/a/y"), Path("/p/a/y")])
    assert list(map(str, names.values())) == ["a/x.jpg.png", "a/x.png.png", "b.c.png", "a/y.png"]
    assert png_names([Path("photo.jpg")]) == {Path("photo.jpg"): Path("photo.png")}


def test_classes_by_name_or_index():
    names = [name for _, name in imagenet_classes()]
    assert find_class(names, "tabby") == find_class(names, "Tabby, tabby cat") == find_class(names, "281") == 281
    ours = ["tabby, tabby cat", "crane", "crane", "Ünï", "7"]
    assert find_class(ours, "7") == 4 and find_class(ours, "ünï") == 3 and find_class(ours, " 2 ") == 2
    with pytest.raises(ValueError, match="of 1000; did you mean Persian cat?"):
        find_class(names, "persian")


def test_colours_are_magma():
    import matplotlib

    values = np.linspace(0, 1, 256)[None]
    magma = matplotlib.colormaps["magma"](values)[..., :3] * 255
    assert np.abs(colour(values) - magma).max() < 3.5


def test_overlay_is_grey_below_and_lightest_at_the_maximum():
    picture = Image.new("RGB", (60, 40), (200, 30, 90))
    heat = np.zeros((4, 6))
    assert len(set(overlay(picture, heat, 0.0).getpixel((5, 5)))) == 1
    heat[1, 4] = 7.0
    drawn = np.asarray(overlay(picture, heat), int).sum(-1)
    y, x = np.unravel_index(drawn.argmax(), drawn.shape)
    assert drawn.shape == (40, 60) and abs(y - 15) < 6 and abs(x - 45) < 6
