"""A model back to a file for timm."""

import io
from pathlib import Path

from porting.convert import state_dict, to_numpy
from res2net_jax.model import Res2Net

SUFFIXES = (".pth", ".safetensors")


def write(model: Res2Net, file: Path) -> None:
    """Writes ``model``'s state dict to ``file``, as ``.pth`` (needs torch) or ``.safetensors``."""
    arrays = {key: to_numpy(value) for key, value in state_dict(model).items()}
    (_write_torch if file.suffix == ".pth" else _write_safetensors)(arrays, file)


def _write_torch(arrays, file):
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "writing a .pth needs torch: pip install 'res2net_jax[port]', or write .safetensors"
        ) from error
    content = io.BytesIO()  # torch says nothing useful of a full disk
    torch.save({key: torch.from_numpy(value.copy()) for key, value in arrays.items()}, content)
    file.write_bytes(content.getbuffer())


def _write_safetensors(arrays, file):
    import safetensors.numpy

    file.write_bytes(safetensors.numpy.save(arrays, metadata={"format": "pt"}))
