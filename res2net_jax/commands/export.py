"""``export``: a model as a file for other programs."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from res2net_jax import files, formats, hub
from res2net_jax.commands.models import parse_size


def export(
    model: Annotated[str, tyro.conf.Positional],
    file: Annotated[Path, tyro.conf.Positional],
    dtype: Literal["float32", "bfloat16"] | None = None,
    size: str | None = None,
    uint8: bool = False,
    weights_beside: bool = False,
    force: bool = False,
    cache_dir: Path | None = None,
) -> None:
    """Writes a model for other programs, e.g. export runs/flowers/checkpoints flowers.onnx

    What is written is run and compared with the model first; nothing is left that computes something else.

    Args:
        model: A name, a checkpoint folder, or hf://user/name.
        file: FILE.stablehlo (JAX on cpu, cuda and tpu), FILE.onnx, or FILE.pth and FILE.safetensors for timm.
        dtype: Computation type of a .stablehlo.
        size: Height x width of its images, by default those of the model's evaluation.
        uint8: It takes pictures in uint8 and normalises them inside.
        weights_beside: Keep the weights of a .stablehlo in FILE.weights.safetensors.
        force: Replace a file that exists.
        cache_dir: Cache folder, by default $RES2NET_JAX_HOME or the platform's own.
    """
    options = {"dtype": dtype, "uint8": uint8, "weights_beside": weights_beside, "overwrite": force}
    formats.require_format(file)
    files.refuse_existing(file, force)
    loaded = hub.load(model, cache_dir=cache_dir)
    print(formats.export(loaded, file, size=parse_size(size) if size else None, **options))
