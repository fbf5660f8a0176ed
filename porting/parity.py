"""The certificate: our model against timm's, with the same weights on the same images."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from porting.convert import load_state_dict, to_numpy
from porting.twin import twin
from res2net_jax.arch import override
from res2net_jax.files import versions
from res2net_jax.model import Res2Net
from res2net_jax.variants import get_variant

SIZES = ((224, 224), (193, 161))
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
SLACK = 5  # two roundings of one computation may be this much further apart than one of them from the truth
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "logits")


def certify(name: str, state_dict: Mapping[str, np.ndarray], **arch) -> dict[str, Any]:
    """Runs ``state_dict`` in both models and reports how far they are apart.

    The images are normal noise from a fixed seed, two at the size of the published accuracies and two
    at an odd, oblong one. Compared are the stem, the four stages and the logits, in float64 (the proof:
    rounding is too small to hide a mistake) and in float32. Everything runs on the CPU.

    Args:
        name: The variant.
        state_dict: Its weights, under torch's keys.
        **arch: Fields of :class:`res2net_jax.Arch` in which the model differs from the variant.

    Returns:
        A JSON certificate. ``error[dtype][size][stage]`` is the largest difference, relative to
        timm's largest value there, and ``rounding[size][stage]`` how far timm's own float32 is from its
        float64. Without torch or timm it is ``certified: False`` with the reason, and so of a model without
        four stages, for which timm has no counterpart.

    Raises:
        ValueError: The models differ by more than ``TOLERANCE``, in float32 also by more than
            ``SLACK`` times timm's own rounding; the message has the whole table.
    """
    try:
        import timm
        import torch
    except ImportError as error:
        return {"certified": False, "reason": f"timm or torch is missing ({error}): pip install 'res2net_jax[port]'"}

    variant = get_variant(name)
    options = {"arch": override(variant.arch, **arch), "name": name}
    if len(options["arch"].layers) != 4:
        return {"certified": False, "reason": "timm's models have four stages"}
    state_dict = {key: to_numpy(value).astype(np.float32) for key, value in state_dict.items()}
    counts = {
        "num_classes": state_dict["fc.weight"].shape[0] if "fc.weight" in state_dict else 0,
        "in_chans": state_dict["conv1.0.weight" if options["arch"].stem_type else "conv1.weight"].shape[1],
    }
    if options["arch"] == variant.arch:  # timm's own definition of the name is the reference
        reference = timm.create_model(name, **counts)
    else:
        reference = twin(options["arch"], **counts)
    reference.load_state_dict({key: torch.from_numpy(value.copy()) for key, value in state_dict.items()}, strict=True)
    reference.eval()

    sizes = {f"{height}x{width}": _images(height, width, counts["in_chans"]) for height, width in SIZES}
    theirs, error = {}, {}
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.enable_x64(True), jax.default_device(cpu):
        for dtype in TOLERANCE:
            model = Res2Net(**options, **counts, param_dtype=dtype)
            load_state_dict(model, state_dict).eval()
            reference.to(getattr(torch, dtype))
            theirs[dtype] = {size: _torch_stages(reference, images.astype(dtype)) for size, images in sizes.items()}
            ours = {size: _stages(model, jnp.asarray(images, dtype)) for size, images in sizes.items()}
            error[dtype] = {size: differences(ours[size], theirs[dtype][size]) for size in sizes}
    rounding = {size: differences(theirs["float32"][size], theirs["float64"][size]) for size in sizes}

    allowed = dict(TOLERANCE)
    allowed["float32"] = max(allowed["float32"], SLACK * max(max(stages.values()) for stages in rounding.values()))

    certificate = {
        "certified": True,
        "reference": f"timm {timm.__version__}, torch {torch.__version__}",
        "allowed": allowed,
        "error": error,
        "rounding": rounding,
        "versions": versions("jax", "jaxlib", "flax", "numpy", "torch", "timm"),
    }
    if not all(np.isfinite(stage).all() for sizes in theirs.values() for stages in sizes.values() for stage in stages):
        raise ValueError(
            f"with these weights timm's {name} itself gives infinity or NaN, so there is nothing to compare with; "
            "verify=False (--no-verify) ports them without a certificate"
        )
    failed = [dtype for dtype, limit in allowed.items() if not worst(certificate, dtype) <= limit]
    if failed:
        raise ValueError(
            f"{name} does not agree with timm in {' and '.join(failed)}; nothing was written. "
            f"Largest relative differences (allowed: {allowed}):\n{error}"
        )
    return certificate


def differences(ours: list, theirs: list) -> dict[str, float]:
    """The largest difference at each of ``STAGES``, relative to the largest value of ``theirs``."""
    pairs = zip(STAGES, ours, theirs, strict=True)
    # Of zeros, which a classifier of zeros gives, the difference itself.
    return {stage: float(np.abs(np.asarray(a) - b).max() / (np.abs(b).max() or 1)) for stage, a, b in pairs}


def worst(certificate: Mapping[str, Any], dtype: str) -> float:
    """The largest error of a certificate in ``dtype``; NaN if there is one."""
    return float(np.max([error for size in certificate["error"][dtype].values() for error in size.values()]))


@jax.jit
def _stages(model, images):
    features, intermediates = model.forward_intermediates(images)
    return [*intermediates, model.forward_head(features)]


def _torch_stages(reference, images):
    import torch

    with torch.inference_mode():
        features, intermediates = reference.forward_intermediates(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
        logits = reference.forward_head(features)
    outputs = [stage.numpy() for stage in (*intermediates, logits)]  # without a pool the last is a map too
    return [value.transpose(0, 2, 3, 1) if value.ndim == 4 else value for value in outputs]


def _images(height, width, in_chans):
    return np.random.default_rng(0).standard_normal((2, height, width, in_chans))
