"""Arguments, checked: an error says what was given, what was expected, and what to do."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def natural(name: str, value: int, *, least: int = 0) -> int:
    """``value`` as an int; ValueError unless it is a whole number from ``least`` up (numpy's count)."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be a whole number from {least} up; got {value!r}")
    return int(value)


def require_images(x: Any, in_chans: int) -> None:
    """TypeError or ValueError unless ``x`` is a batch of images [b, h, w, in_chans] in floating point."""
    require_array(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"expected normalised floating-point images; got {x.dtype}. "
            "res2net_jax.preprocess(model) makes one from a picture: a file, a PIL image, or uint8 [h, w, 3]"
        )
    if jnp.ndim(x) != 4 or x.shape[-1] != in_chans:
        hint = ""
        if jnp.ndim(x) == 4 and x.shape[1] == in_chans:
            hint = "; this looks like NCHW, so pass x.transpose(0, 2, 3, 1)"
        elif jnp.ndim(x) == 3:
            hint = "; for a single image pass x[None]"
        raise ValueError(f"expected images of shape [batch, height, width, {in_chans}]; got {list(jnp.shape(x))}{hint}")
    if any(isinstance(side, int) and side == 0 for side in x.shape[1:3]):
        raise ValueError(f"expected images of at least one pixel; got {list(x.shape)}")


def require_array(images: Any) -> None:
    """TypeError for what is not an array, such as a torch tensor or a path, or has numbers that JAX lacks."""
    if isinstance(images, np.ndarray):
        dtype = images.dtype
        if not dtype.isnative or dtype.kind in "OSUMm" or dtype.itemsize > 8:
            raise TypeError(f"JAX has no numbers of type {dtype!r}; pass images.astype('float32')")
    if isinstance(images, jax.Array | np.ndarray) or hasattr(images, "__jax_array__"):
        return
    hint = "res2net_jax.preprocess(model) makes an image of a picture, numpy.stack a batch of several"
    if hasattr(images, "numpy"):
        hint = "pass its .numpy(), with the channels last"
    raise TypeError(f"expected an array [batch, height, width, channels]; got a {type(images).__name__}. {hint}")


def one_a_class(names: Sequence[str] | None, num_classes: int) -> tuple[str, ...] | None:
    """The names of the classes as a tuple; ValueError unless there are as many."""
    if names is None:
        return None
    if isinstance(names, str) or len(names) != num_classes:
        raise ValueError(f"class_names must be {num_classes} names, one per class; got {names!r:.100}")
    return tuple(names)


def floating(name: str, dtype: Any) -> jnp.dtype:
    """``dtype`` as JAX has it; ValueError unless it is a floating-point type that it has now."""
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        raise ValueError(f"{name} must be a floating-point type, e.g. float32 or bfloat16; got {dtype!r}") from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} must be a floating-point type, e.g. float32 or bfloat16; got {dtype}")
    if dtype == jnp.float64 and not jax.config.jax_enable_x64:
        raise ValueError(f'{name} float64 needs jax.config.update("jax_enable_x64", True); JAX would use float32')
    return dtype
