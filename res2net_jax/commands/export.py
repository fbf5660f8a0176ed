"""``export``: a model as a file for other programs."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from res2net_jax import files, formats, hub, stablehlo
from res2net_jax.commands.models import parse_size
from res2net_jax.commands.options import CacheFolder, CheckHash, Model, Source, Text
from res2net_jax.features import FeaturePyramid


def export(
    model: Model,
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE", help_behavior_hint="")],
    dtype: Annotated[Literal["float32", "bfloat16"] | None, tyro.conf.arg(help_behavior_hint="")] = None,
    size: Text = None,
    out_indices: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N...", help_behavior_hint="")] = (),
    uint8: bool = False,
    weights_beside: bool = False,
    force: bool = False,
    source: Source = None,
    check_hash: CheckHash = True,
    cache_dir: CacheFolder = None,
) -> None:
    """python -m res2net_jax export res2net50d model.onnx --uint8

    Writes a model for other programs. A StableHLO or ONNX program is run on the CPU and compared with the model first,
    and not kept if it computes something else.

    Args:
        file: FILE.stablehlo (JAX on cpu, cuda and tpu), FILE.onnx, or FILE.pth and FILE.safetensors for timm.
        dtype: Computation type of a .stablehlo, by default float32.
        size: Height x width of the images, by default those of the model's evaluation.
        out_indices: Give the maps of these stages instead of logits, e.g. 1 2 3 4; 0 is the stem.
        uint8: Take pictures in uint8 and normalise them inside.
        weights_beside: Keep the weights of a .stablehlo in FILE.weights.safetensors.
        force: Replace a file that exists.
    """
    options = {"dtype": dtype, "size": parse_size(size) if size else None, "uint8": uint8}
    file = file.expanduser()
    formats.check_format(file)
    files.check_new(file, force)
    loaded = hub.load(model, source=source, cache_dir=cache_dir, check_hash=check_hash)
    if out_indices:
        loaded = FeaturePyramid(loaded, out_indices)
    print(formats.export(loaded, file, weights_beside=weights_beside, overwrite=force, **options))
    if weights_beside:
        print(stablehlo.weights_file(file))
