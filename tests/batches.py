"""What the tests of batches share."""

import itertools

import numpy as np

from train.data import Augment

PLAIN = Augment(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0)


def take(batches, n):
    try:
        return list(itertools.islice(batches, n))
    finally:
        batches.close()


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert one[key].dtype == other[key].dtype and np.array_equal(one[key], other[key]), key
