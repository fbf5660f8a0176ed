"""Arrays for us, tensors for torch, and how far apart the answers are."""

import numpy as np
import torch


def images(shape, dtype):
    return np.random.default_rng(1).standard_normal(shape).astype(dtype)


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def difference(ours, theirs):
    """Largest difference relative to the largest reference value; maps are compared in NHWC."""
    theirs = theirs.detach().numpy()
    theirs = theirs.transpose(0, 2, 3, 1) if theirs.ndim == 4 else theirs
    assert ours.shape == theirs.shape
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
