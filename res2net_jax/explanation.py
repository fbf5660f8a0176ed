"""Where in an image the evidence for a class is: Grad-CAM and Grad-CAM++.

R. R. Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", ICCV 2017;
A. Chattopadhay et al., "Grad-CAM++: Improved Visual Explanations for Deep Convolutional Networks", WACV 2018.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from res2net_jax.backend import jit
from res2net_jax.blocks import run
from res2net_jax.init import require_model
from res2net_jax.layers import common_type, is_in_train_mode
from res2net_jax.model import Res2Net

METHODS = ("gradcam", "gradcam++")


def explain(
    model: Res2Net,
    images: Float[Array, "b h w c"],
    *,
    method: str = "gradcam",
    stage: str | None = None,
    classes: int | Sequence[int] | Int[Array, " b"] | Int[Array, "b k"] | None = None,
) -> Float[Array, "b h2 w2"] | Float[Array, "b k h2 w2"]:
    """How much each place of a stage's output speaks for a class.

    With A the output of the stage and S the class's logit, a map is relu(sum_k w_k A_k). In Grad-CAM (equations 1
    and 2) w_k is the mean of g = dS/dA_k over the places. In Grad-CAM++ it is the sum of alpha relu(g) with alpha =
    g^2 / (2 g^2 + g^3 sum A_k), the paper's closed form for a score exp(S), whose factor exp(S) of the whole map is
    left out.

    Args:
        model: In eval mode, with a classifier.
        images: Normalised images.
        method: ``"gradcam"`` or ``"gradcam++"``.
        stage: ``"act1"`` (the stem), ``"layer1"`` to ``"layer4"``; by default the last. Early ones are finer in place,
            late ones in meaning.
        classes: One class for all images, one per image, or several per image. None takes each image's likeliest. Of
            traced ones, which cannot be checked, one that the model does not have gives a map of zeros.

    Returns:
        Maps at the resolution of the stage, at least 0 and not scaled; several an image if ``classes`` has two axes. In
        float32, or float64 for a float64 model.

    Raises:
        ValueError: No such method, stage or class; a model in train mode or without classifier; images as for a call
            of the model.
    """
    if method not in METHODS:
        raise ValueError(f"there is no method {method!r}; choose {' or '.join(METHODS)}")
    require_model(model)
    stage = check_stage(model, stage)
    if not model.num_classes:
        raise ValueError("this model has no classifier (num_classes=0), so there is no class to explain")
    if is_in_train_mode(model):
        raise ValueError("this model is in train mode, so its maps would depend on the batch; call model.eval()")
    model.check_images(images)
    if classes is not None:
        classes = _check_classes(classes, len(images), model.num_classes)
    of_each = classes if classes is None or classes.ndim == 2 else classes[:, None]
    maps = _compiled_maps()(model, images, of_each, method, stage)
    return maps if classes is not None and classes.ndim == 2 else maps[:, 0]


def check_stage(model: Res2Net, stage: str | None) -> str:
    """``stage``, or the last one for None; ValueError if ``model`` has none of that name."""
    stages = [info["module"] for info in model.feature_info]
    if stage is None:
        return stages[-1]
    if stage not in stages:
        raise ValueError(f"there is no stage {stage!r}; this model has {', '.join(stages)}")
    return stage


def _check_classes(classes, count, num_classes):
    is_traced = isinstance(classes, jax.core.Tracer)
    classes = classes if is_traced else np.asarray(classes)
    if classes.dtype.kind not in "iu":
        raise TypeError(f"classes are indices, whole numbers; got {classes.dtype}")
    if classes.ndim == 0:
        classes = jnp.full(count, classes) if is_traced else np.full(count, classes)
    if classes.ndim > 2 or len(classes) != count:
        raise ValueError(
            f"expected one class, or classes of shape [{count}] or [{count}, k] for {count} images; got shape "
            f"{list(classes.shape)}"
        )
    if is_traced:  # what is out of range then has a map of zeros
        return classes
    wrong = classes[(classes < 0) | (classes >= num_classes)]
    if wrong.size:
        raise ValueError(f"there is no class {wrong[0]}; this model has {num_classes}, from 0 to {num_classes - 1}")
    return classes


@functools.cache
def _compiled_maps():
    @functools.partial(jit, static_argnames=("method", "stage"))
    def maps(model, images, classes, method, stage):
        index = [info["module"] for info in model.feature_info].index(stage)
        _, (features,) = model.forward_intermediates(images, [index], stop_early=True)
        logits, pull_back = jax.vjp(lambda features: _from_stage(model, features, index), features)
        if classes is None:
            classes = jnp.argmax(logits, -1)[:, None]
        one_hot = jax.nn.one_hot(classes.T, model.num_classes, dtype=logits.dtype)  # [k, b, num_classes]
        precision = common_type(features.dtype, jnp.float32)
        features = features.astype(precision)

        def of_class(one_hot):
            (gradients,) = pull_back(one_hot)
            weights = _weights(features, gradients.astype(precision), method)
            return jax.nn.relu(jnp.einsum("bhwf,bf->bhw", features, weights, precision="highest"))

        return jnp.moveaxis(jax.lax.map(of_class, one_hot), 0, 1)

    return maps


def _weights(features, gradients, method):
    if method == "gradcam":
        return gradients.mean((1, 2))
    # alpha with g^2 cancelled, as g^2 and g^3 underflow; only a positive g counts.
    positive = jax.nn.relu(gradients)
    denominator = 2 + positive * features.sum((1, 2), keepdims=True)
    return (positive / jnp.where(denominator == 0, 1, denominator)).sum((1, 2))


def _from_stage(model, features, index):
    """Logits from the output at ``index`` of ``feature_info``."""
    if index == 0:
        features = run(model.maxpool, features)
    for stage in model.stages[index:]:
        for block in stage:
            features = block(features, None)
    return model.forward_head(features)
