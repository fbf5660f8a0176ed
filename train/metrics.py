"""Counting right answers: pure functions of a batch, whose sums over any number of batches and devices are exact."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def count(
    logits: Float[Array, "b k"],
    labels: Int[Array, " b"] | Bool[Array, "b k"],
    mask: Bool[Array, " b"],
    class_subset: tuple[int, ...] | None = None,
) -> dict[str, Int[Array, ""]]:
    """How many examples of a batch are right.

    An example is right among its top k if at least one of its labels is among the k largest logits, or all
    logits if there are fewer. Of equal logits the first counts as larger. A NaN is never right.

    Args:
        logits: Scores of all classes.
        labels: One label each, or for a multi-label set a bool for each class. An example without any label
            is not counted (Beyer et al., Are we done with ImageNet?, https://arxiv.org/abs/2006.07159, section 3).
        mask: False for padding, which is not counted.
        class_subset: The classes to choose among (ImageNet-A and -R); the other logits are ignored.

    Returns:
        ``top1``, ``top5`` and ``count``: int32 sums over the batch.
    """
    classes = jnp.arange(logits.shape[-1])
    right = labels if labels.ndim == 2 else labels[:, None] == classes
    if class_subset is not None:
        keep = np.array(class_subset)
        logits, right = logits[:, keep], right[:, keep]
    # The rank of the best right class: how many classes score above it, or as much and come first.
    scores = jnp.where(right, logits, -jnp.inf)
    best = jnp.argmax(scores, axis=-1)[:, None]
    score = jnp.take_along_axis(logits, best, axis=-1)
    position = jnp.arange(logits.shape[-1])
    rank = jnp.sum((logits > score) | ((logits == score) & (position < best)), axis=-1)
    labelled = right.any(-1)
    counted = mask & labelled if labels.ndim == 2 else mask
    scored = counted & labelled & ~jnp.isnan(logits).any(-1)
    return {
        "top1": jnp.sum(scored & (rank < 1), dtype=jnp.int32),
        "top5": jnp.sum(scored & (rank < 5), dtype=jnp.int32),
        "count": jnp.sum(counted, dtype=jnp.int32),
    }
