"""What is done to a whole batch, on the device: normalisation, mixup, CutMix, random erasing."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


def normalise(
    images: UInt8[Array, "b h w c"], mean: tuple[float, ...], std: tuple[float, ...], dtype=jnp.float32
) -> Float[Array, "b h w c"]:
    """``(images / 255 - mean) / std``, a constant a channel, rounded to ``dtype`` once."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return ((images.astype(wide) / 255 - jnp.asarray(mean, wide)) / jnp.asarray(std, wide)).astype(dtype)


def mix(
    key: Array, images: Float[Array, "b h w c"], targets: Float[Array, "b k"], *, mixup: float, cutmix: float
) -> tuple[Float[Array, "b h w c"], Float[Array, "b k"]]:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019), one draw a batch; both on: one of the two, evenly.

    Image i is mixed with image b-1-i, and its target in the same proportion lambda ~ Beta(alpha, alpha).
    CutMix's lambda is the share of the image that is left once the box is clipped to it.
    """
    choose, draw, place = jax.random.split(key, 3)
    use_cutmix = jax.random.bernoulli(choose) if mixup and cutmix else jnp.asarray(bool(cutmix))
    alpha = jnp.where(use_cutmix, cutmix, mixup).astype(targets.dtype)
    share = jax.random.beta(draw, alpha, alpha, dtype=targets.dtype)
    box = _box(place, images.shape[1:3], 1 - share)
    share = jnp.where(use_cutmix, 1 - box.mean(dtype=targets.dtype), share)
    other = images[::-1]
    cut = jnp.where(box[None, :, :, None], other, images)
    blend = share.astype(images.dtype) * images + (1 - share).astype(images.dtype) * other
    return jnp.where(use_cutmix, cut, blend), share * targets + (1 - share) * targets[::-1]


def random_erasing(
    key: Array,
    images: Float[Array, "b h w c"],
    probability: float,
    *,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Float[Array, "b h w c"]:
    """Zeroes (the mean colour of normalised images) a rectangle of some images (Zhong et al. 2020).

    Args:
        key: Random key.
        images: Normalised images.
        probability: Of an image's being erased.
        area: Range of the rectangle's share of the image, uniform.
        aspect: Range of its height over its width, uniform in the logarithm.
    """

    def rectangle(key):
        keys = jax.random.split(key, 4)
        size = jax.random.uniform(keys[0], minval=area[0], maxval=area[1])
        ratio = jnp.exp(jax.random.uniform(keys[1], minval=jnp.log(aspect[0]), maxval=jnp.log(aspect[1])))
        inside = _rectangle(keys[2], images.shape[1:3], jnp.sqrt(size * ratio), jnp.sqrt(size / ratio))
        return inside & jax.random.bernoulli(keys[3], probability)

    erased = jax.vmap(rectangle)(jax.random.split(key, len(images)))
    return jnp.where(erased[..., None], 0, images)


def _box(key, shape, area):
    """CutMix's box: of the image's own aspect, its centre anywhere, clipped to the image (timm's ``rand_bbox``)."""
    inside = []
    for centre, n in zip(jax.random.uniform(key, (2,)), shape):
        length = jnp.floor(jnp.sqrt(area) * n)
        start = jnp.floor(centre * n) - length // 2
        inside.append((jnp.arange(n) >= start) & (jnp.arange(n) < start + length))
    return inside[0][:, None] & inside[1][None, :]


def _rectangle(key, shape, height, width):
    """A rectangle of these shares of the image's sides, wholly inside it."""
    inside = []
    for place, n, share in zip(jax.random.uniform(key, (2,)), shape, (height, width)):
        length = jnp.clip(jnp.round(share * n), 1, n)
        start = jnp.floor(place * (n - length + 1))
        inside.append((jnp.arange(n) >= start) & (jnp.arange(n) < start + length))
    return inside[0][:, None] & inside[1][None, :]
