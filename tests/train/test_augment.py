import jax
import jax.numpy as jnp
import numpy as np
import timm.data.mixup
from timm.data.random_erasing import RandomErasing

from train import augment
from train.augment import mix, normalise, random_erasing

KEY = jax.random.key(0)


def test_normalise():
    images = np.arange(2 * 2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 2, 3)
    expected = (images / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    np.testing.assert_allclose(normalise(images, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)), expected, rtol=1e-6)


def test_bfloat16_is_rounded_once_and_not_at_each_operation():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    coarse = normalise(images, mean, std, jnp.bfloat16)
    assert coarse.dtype == jnp.bfloat16
    assert np.array_equal(coarse, normalise(images, mean, std).astype(jnp.bfloat16))


def mixed(mixup, cutmix, seed, size=16, batch=6):
    """Image i is all i, so that a pixel tells whence it is."""
    images = jnp.broadcast_to(jnp.arange(batch, dtype=jnp.float32)[:, None, None, None], (batch, size, size, 1))
    return mix(jax.random.key(seed), images, jnp.eye(batch), mixup=mixup, cutmix=cutmix)


def test_mixup_mixes_images_and_targets_alike():
    shares = []
    for seed in range(200):
        images, targets = mixed(0.4, 0, seed)
        share = float(targets[0, 0])
        shares.append(share)
        np.testing.assert_allclose(targets, share * np.eye(6) + (1 - share) * np.eye(6)[::-1], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            images[:, 0, 0, 0], share * np.arange(6) + (1 - share) * np.arange(6)[::-1], rtol=1e-5
        )
    # Beta(0.4, 0.4) has the mean 1/2 and the variance 1 / (4 * 1.8).
    assert abs(np.mean(shares) - 0.5) < 0.08 and abs(np.var(shares) - 1 / 7.2) < 0.02


def test_cutmix_weighs_the_targets_by_the_pixels():
    areas = []
    for seed in range(200):
        images, targets = mixed(0, 1.0, seed)
        kept = np.asarray(images[0, :, :, 0]) == 0
        areas.append(kept.mean())
        np.testing.assert_allclose(targets[0, 0], kept.mean(), atol=1e-6)
        np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-6)
        other = np.asarray(images[0, :, :, 0])[~kept]
        assert (other == 5).all()
        rows, columns = np.flatnonzero(~kept.all(1)), np.flatnonzero(~kept.all(0))
        assert len(rows) * len(columns) == (~kept).sum(), "a rectangle"
    # The box leaves as large a share as timm's, whose lambda is uniform here and which is clipped as ours is.
    np.random.seed(0)
    expected = [timm.data.mixup.cutmix_bbox_and_lam((1, 1, 16, 16), np.random.rand())[1] for _ in range(2000)]
    assert abs(np.mean(areas) - np.mean(expected)) < 0.06 and abs(np.std(areas) - np.std(expected)) < 0.04


def test_cutmix_boxes_are_those_of_timm(monkeypatch):
    rng = np.random.default_rng(0)
    for shape in ((16, 16), (15, 23)):
        for _ in range(100):
            area, centre = rng.random(), rng.random(2).astype(np.float32)
            monkeypatch.setattr(jax.random, "uniform", lambda key, size, centre=centre: jnp.array(centre))
            draws = iter([int(centre[0] * shape[0]), int(centre[1] * shape[1])])
            monkeypatch.setattr(np.random, "randint", lambda low, high, size, draws=draws: np.array(next(draws)))
            top, bottom, left, right = timm.data.mixup.rand_bbox((1, 1, *shape), 1 - area)
            expected = np.zeros(shape, bool)
            expected[top:bottom, left:right] = True
            assert np.array_equal(augment._box(KEY, shape, area), expected)


def test_both_draw_one_of_the_two():
    kinds = [set(np.unique(mixed(1.0, 1.0, seed)[0])) <= set(range(6)) for seed in range(100)]
    assert 35 < sum(kinds) < 65


def rectangles(erased):
    """Top, left, height and width of what is erased of each image [b, h, w]."""
    found = []
    for mask in erased:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask[np.ix_(rows, columns)].all() and len(rows) * len(columns) == mask.sum(), "a rectangle"
        found.append((rows[0], columns[0], len(rows), len(columns)))
    return np.array(found).T


def test_random_erasing():
    images = jnp.ones((400, 32, 32, 2))
    erased = np.asarray(random_erasing(KEY, images, 0.25)) == 0
    assert (erased[..., 0] == erased[..., 1]).all()
    some = erased[..., 0].any((1, 2))
    assert 0.18 < some.mean() < 0.32


def test_erased_rectangles_have_timms_sizes():
    timms = RandomErasing()
    erased = np.asarray(random_erasing(KEY, jnp.ones((2000, 64, 64, 1)), 1.0))[..., 0] == 0
    _, _, height, width = rectangles(erased)
    area, aspect = height * width / 64**2, np.log(height / width)
    inside = (height < 64) & (width < 64)
    assert abs(area.min() - timms.min_area) < 0.01 and abs(area.max() - timms.max_area) < 0.01
    assert abs(area.mean() - (timms.min_area + timms.max_area) / 2) < 0.01
    least, most = timms.log_aspect_ratio
    assert abs(aspect[inside].min() - least) < 0.2 and abs(aspect[inside].max() - most) < 0.2


def test_erased_rectangles_have_the_sizes_asked_for_and_lie_anywhere():
    images = jnp.ones((2000, 64, 64, 1))
    erased = np.asarray(random_erasing(KEY, images, 1.0, area=(0.1, 0.2), aspect=(0.5, 2.0)))[..., 0] == 0
    top, left, height, width = rectangles(erased)
    area, aspect = height * width / 64**2, np.log(height / width)
    assert 0.09 < area.min() < 0.11 and 0.19 < area.max() < 0.21, "sides are rounded"
    assert abs(area.mean() - 0.15) < 0.003
    assert abs(aspect.mean()) < 0.04 and abs(aspect.std() - np.log(4) / np.sqrt(12)) < 0.02
    for start, length in ((top, height), (left, width)):
        assert start.min() == 0 and (start + length).max() == 64
        place = (start + 0.5) / (64 - length + 1)
        assert abs(place.mean() - 0.5) < 0.03 and abs(place.std() - 1 / np.sqrt(12)) < 0.02
    assert abs(np.corrcoef(top / (65 - height), left / (65 - width))[0, 1]) < 0.08


def test_of_a_tiny_image_at_least_a_pixel_is_erased_and_at_most_all():
    images = jnp.ones((200, 4, 4, 1))
    _, _, height, width = rectangles(np.asarray(random_erasing(KEY, images, 1.0))[..., 0] == 0)
    assert (height * width).min() == 1
    assert (random_erasing(KEY, images, 1.0, area=(2.0, 3.0), aspect=(0.9, 1.1)) == 0).all()
