"""The certificate: our model against timm's, with the same weights on the same images."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from porting.convert import load_state_dict
from res2net_jax.checkpoint import versions
from res2net_jax.model import Res2Net
from res2net_jax.variants import get_variant

SIZES = ((224, 224), (193, 161))
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "logits")


def certify(name: str, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Runs ``state_dict`` in both models and reports how far they are apart.

    The images are normal noise from a fixed seed, two at the size of the published accuracies and two
    at an odd, oblong one. Compared are the stem, the four stages and the logits, in float64 (the proof:
    rounding is too small to hide a mistake) and in float32. Everything runs on the CPU.

    Returns:
        A JSON certificate. ``error[dtype][size][stage]`` is the largest difference, relative to
        timm's largest value there. Without torch or timm it is ``certified: False`` with the reason.

    Raises:
        ValueError: The models differ by more than ``TOLERANCE``; the message has the whole table.
    """
    try:
        import timm
        import torch
    except ImportError as error:
        return {"certified": False, "reason": f"{error.name} is not installed: pip install 'res2net_jax[port]'"}

    num_classes, in_chans = state_dict["fc.weight"].shape[0], _in_chans(name, state_dict)
    reference = timm.create_model(name, num_classes=num_classes, in_chans=in_chans)
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in state_dict.items()}
    reference.load_state_dict(tensors, strict=True)
    reference.eval()

    error = {}
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.enable_x64(True), jax.default_device(cpu):
        for dtype in TOLERANCE:
            model = Res2Net(
                get_variant(name).arch, num_classes=num_classes, in_chans=in_chans, param_dtype=dtype, name=name
            )
            load_state_dict(model, state_dict).eval()
            reference.to(getattr(torch, dtype))
            error[dtype] = {
                f"{height}x{width}": compare(model, reference, _images(height, width, in_chans, dtype))
                for height, width in SIZES
            }

    certificate = {
        "certified": True,
        "reference": f"timm {timm.__version__}, torch {torch.__version__}",
        "tolerance": TOLERANCE,
        "error": error,
        "versions": versions("jax", "jaxlib", "flax", "numpy", "torch", "timm"),
    }
    failed = [d for d, limit in TOLERANCE.items() if not worst(certificate, d) <= limit]
    if failed:
        raise ValueError(
            f"{name} does not agree with timm in {' and '.join(failed)}; nothing was written. "
            f"Largest relative differences (allowed: {TOLERANCE}):\n{error}"
        )
    return certificate


def compare(model: Res2Net, reference, images: np.ndarray) -> dict[str, float]:
    """Largest relative difference at each of ``STAGES``; ``reference`` is the timm model, images are NHWC."""
    import torch

    with torch.inference_mode():
        features, theirs = reference.forward_intermediates(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
        theirs.append(reference.forward_head(features))
    ours = _stages(model, jnp.asarray(images))
    errors = {}
    for stage, a, b in zip(STAGES, ours, theirs, strict=True):
        b = b.numpy()
        b = b.transpose(0, 2, 3, 1) if b.ndim == 4 else b
        errors[stage] = float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())
    return errors


def worst(certificate: Mapping[str, Any], dtype: str) -> float:
    """The largest error of a certificate in ``dtype``; NaN if there is one."""
    return float(np.max([error for size in certificate["error"][dtype].values() for error in size.values()]))


@jax.jit
def _stages(model, images):
    features, intermediates = model.forward_intermediates(images)
    return [*intermediates, model.forward_head(features)]


def _images(height, width, in_chans, dtype):
    return np.random.default_rng(0).standard_normal((2, height, width, in_chans)).astype(dtype)


def _in_chans(name, state_dict):
    first = "conv1.0.weight" if get_variant(name).arch.stem_type else "conv1.weight"
    return state_dict[first].shape[1]
