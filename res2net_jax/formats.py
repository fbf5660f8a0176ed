"""A model as a file for other programs: StableHLO, ONNX, or a state dict for timm."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from res2net_jax import files, stablehlo
from res2net_jax.checks import natural
from res2net_jax.features import FeaturePyramid, backbone_of
from res2net_jax.hub import import_porting
from res2net_jax.init import require_model
from res2net_jax.layers import is_in_train_mode
from res2net_jax.model import Res2Net
from res2net_jax.preprocess import known_setting
from res2net_jax.variants import Preprocessing

SUFFIXES = (stablehlo.SUFFIX, ".onnx", ".pth", ".safetensors")
_MOST = 2**14  # of an image's side: pixels beyond some 2**30 are more than XLA counts
# How far a file's outputs may be from the model's in float32, of the largest one.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05}
ONNX_TOLERANCE = 1e-4


def export(
    model: Res2Net | FeaturePyramid,
    file: str | os.PathLike,
    *,
    dtype: Any = None,
    size: int | tuple[int, int] | None = None,
    uint8: bool = False,
    weights_beside: bool = False,
    overwrite: bool = False,
) -> Path:
    """Writes ``model`` for other programs, in the format that the name of ``file`` ends in.

    ``.stablehlo`` (jax.export) runs in JAX without this library on cpu, cuda and tpu, see
    :mod:`res2net_jax.stablehlo`; ``.onnx`` (needs the extra ``onnx``) in ONNX Runtime and others. Both take images
    [b, h, w, c], give float32 logits [b, k] at any batch size, and are run against ``model`` on noise before they
    get their name. ``.pth`` (needs torch) and ``.safetensors`` are bare state dicts that timm loads strictly.

    A model of ``features_only=True`` gives a list of maps [b, h2, w2, f] instead, in ONNX outputs that are called as
    ``feature_info`` calls them (``layer1``); its state dict is one for timm's ``features_only=True``.

    Args:
        model: In eval mode; also one of ``features_only=True``.
        file: The file; it appears whole or not at all.
        dtype: For ``.stablehlo`` the computation type, float32 or bfloat16; by default the model's own, else float32.
        size: Of the images, one number or height and width; by default the model's own.
        uint8: Take pictures in uint8, RGB from 0 to 255, and normalise them inside.
        weights_beside: For ``.stablehlo``: keep the weights in ``.weights.safetensors`` beside it; they are its first
            argument.
        overwrite: Replace the file.

    Raises:
        ValueError: Another suffix, an option that the format does not have, a model in train mode, or a file that
            does not compute what the model does, which is not kept.
        FileExistsError: ``file`` exists.
        ImportError: A package that the format needs is missing.
        OSError: No permission, no space.
    """
    file = Path(file).expanduser()
    check_format(file)
    backbone = backbone_of(model)
    require_model(backbone)
    if backbone.bn1.folded:
        raise ValueError("a fused model cannot be exported; export the one that it was made from")
    if is_in_train_mode(backbone):
        raise ValueError("only a model in eval mode can be exported; call model.eval()")
    if file.suffix != stablehlo.SUFFIX and (dtype is not None or weights_beside):
        raise ValueError(f"dtype and weights_beside are options of {stablehlo.SUFFIX}; {file.suffix} has none of them")
    beside = stablehlo.weights_file(file) if weights_beside else None
    for target in filter(None, (file, beside)):
        files.check_new(target, overwrite)
    if file.suffix in (".pth", ".safetensors"):
        if uint8 or size is not None:
            raise ValueError(f"uint8 and size are of programs; {file.suffix} holds weights alone")
        import_porting()
        import porting.export

        with files.replacing(file, overwrite=overwrite) as temporary:
            porting.export.write(backbone, temporary)
        return file

    dtype = _computation_type(backbone.dtype if dtype is None and file.suffix == stablehlo.SUFFIX else dtype)
    model = _on_cpu(model)
    size, scaling = _size(backbone, size), _scaling(backbone) if uint8 else None
    with files.replacing(file, overwrite=overwrite) as temporary:
        if file.suffix == ".onnx":
            import_porting()
            import porting.onnx

            porting.onnx.write(model, temporary, size=size, scaling=scaling)
            run, tolerance = porting.onnx.load(temporary), ONNX_TOLERANCE
            _check(run, model, size, scaling, tolerance)
        else:
            try:
                stablehlo.write(model, temporary, dtype=dtype, size=size, scaling=scaling, beside=weights_beside)
                _check(stablehlo.load(temporary), model, size, scaling, TOLERANCE[dtype.name])
                if beside:
                    os.replace(stablehlo.weights_file(temporary), beside)
            finally:
                stablehlo.weights_file(temporary).unlink(missing_ok=True)
    return file


def check_format(file: Path) -> None:
    """ValueError if the name of ``file`` ends in no format."""
    if file.suffix not in SUFFIXES:
        raise ValueError(f"the name of the file says its format, one of {' '.join(SUFFIXES)}; got {file}")


def _computation_type(dtype):
    dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
    if dtype.name not in TOLERANCE:
        raise ValueError(f"dtype is one of {', '.join(TOLERANCE)}; got {dtype}")
    return dtype


def _on_cpu(model):
    """``model`` on the CPU, computing in float32: rounds the same wherever it is exported."""
    graphdef, state = nnx.split(model)
    model = nnx.merge(graphdef, jax.device_put(state, jax.local_devices(backend="cpu")[0]))
    model.set_attributes(dtype=jnp.dtype(jnp.float32))
    return model


def _size(model, size):
    if size is None:
        size = (known_setting(model) or Preprocessing()).size
    sides = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(sides) != 2 or any(natural("size (in pixels)", side, least=1) > _MOST for side in sides):
        raise ValueError(f"size is (height, width) in pixels, at most {_MOST:,} each; got {size!r}")
    return sides


def _scaling(model):
    setting = known_setting(model)
    if setting is None:
        raise ValueError(
            f"uint8=True normalises pictures inside, but {model.name} with {model.in_chans} input channels knows no "
            "mean and standard deviation; leave it out, or set model.preprocessing to a res2net_jax.Preprocessing"
        )
    return setting


def _check(run, model, size, scaling, tolerance):
    """ValueError unless ``run`` gives what ``model`` does, at two batch sizes."""
    rng = np.random.default_rng(0)
    channels = backbone_of(model).in_chans
    pixels = rng.integers(0, 256, (3, *size, channels), np.uint8)
    setting = scaling or Preprocessing(mean=(0.45,) * channels, std=(0.225,) * channels)
    images = ((pixels / 255 - np.array(setting.mean)) / np.array(setting.std)).astype(np.float32)
    given = pixels if scaling else images
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        expected = jax.device_get(jax.tree.leaves(jax.jit(lambda model, images: model(images))(model, images)))
        for count in (1, 3):
            outputs = jax.tree.leaves(run(given[:count]))
            pairs = zip(outputs, expected, strict=True)
            error = np.max([np.abs(np.asarray(a) - b[:count]).max() / np.abs(b).max() for a, b in pairs])
            if not error <= tolerance:
                raise ValueError(
                    f"the file does not compute what the model does: its outputs are {error:.1e} of the largest one "
                    f"away at batch size {count}, where {tolerance:.0e} is allowed; it was not kept"
                )
