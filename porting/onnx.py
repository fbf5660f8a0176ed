"""A model as ONNX: torch's exporter writes timm's model of the same architecture under our weights."""

import contextlib
import io
import logging
import warnings
from pathlib import Path

import numpy as np

from porting.twin import timm_model, with_weights
from res2net_jax.features import FeaturePyramid, backbone_of
from res2net_jax.model import Res2Net
from res2net_jax.variants import Preprocessing

_MISSING = "an .onnx file needs torch, timm, onnx and onnxruntime: pip install 'res2net_jax[onnx]' ({})"


def write(model: Res2Net | FeaturePyramid, file: Path, *, size: tuple[int, int], scaling: Preprocessing | None) -> None:
    """Writes ``model`` to ``file``: images [batch, *size, in_chans] in, float32 logits out, or a pyramid's maps.

    Args:
        model: In eval mode.
        file: The ONNX file.
        size: Height and width of the images.
        scaling: For uint8 pictures, mean and standard deviation to normalise them by; None for normalised images.

    Raises:
        ImportError: The extra ``onnx`` is missing.
    """
    try:
        import onnxscript  # noqa: F401  torch's exporter needs it
        import torch
    except ImportError as error:
        raise ImportError(_MISSING.format(error)) from error
    is_pyramid = isinstance(model, FeaturePyramid)

    class Images(torch.nn.Module):
        """NHWC, and normalises pictures; as the model in JAX takes them."""

        def __init__(self):
            super().__init__()
            self.model, self.maps = _pyramid(model) if is_pyramid else (timm_model(model), None)
            self.eval()

        def forward(self, images):
            if scaling is not None:
                images = (images.float() / 255 - torch.tensor(scaling.mean)) / torch.tensor(scaling.std)
            images = images.permute(0, 3, 1, 2)
            outputs = self.maps(images) if is_pyramid else [self.model(images)]
            return [output.permute(0, 2, 3, 1) if output.ndim == 4 else output for output in outputs]

    example = torch.zeros((2, *size, backbone_of(model).in_chans), dtype=torch.uint8 if scaling else torch.float32)
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Images(),
            (example,),
            file,
            dynamo=True,
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            input_names=["images"],
            output_names=model.feature_info.module_name() if is_pyramid else ["logits"],
            external_data=False,
            verbose=False,
        )


def load(file: Path):
    """What ``file`` computes, by ONNX Runtime on the CPU: images -> logits, or a pyramid's maps, as numpy arrays."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(_MISSING.format(error)) from error
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(images):
        outputs = session.run(None, {"images": np.asarray(images)})
        return outputs[0] if session.get_outputs()[0].name == "logits" else outputs

    return run


def _pyramid(pyramid):
    """timm's model, and what its stem and stages give."""
    model, stages = with_weights(pyramid.backbone)

    def maps(images):
        x = model.act1(model.bn1(model.conv1(images)))
        outputs = [x]
        x = model.maxpool(x)
        for stage in stages:
            x = stage(x)
            outputs.append(x)
        return [outputs[i] for i in pyramid.out_indices]

    return model, maps


@contextlib.contextmanager
def _quiet():
    """torch's exporter prints its steps."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
