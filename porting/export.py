"""A checkpoint back to a file for timm."""

import io
import os
from pathlib import Path

from porting.convert import state_dict, to_numpy
from res2net_jax import checkpoint, files
from res2net_jax.model import Res2Net

SUFFIXES = (".pth", ".safetensors")


def export(folder: str | os.PathLike, file: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """Writes the checkpoint in ``folder`` as a bare state dict that timm loads strictly.

    Args:
        folder: A checkpoint.
        file: Ends in ``.pth`` (needs torch) or ``.safetensors``; it appears whole or not at all.
        overwrite: Replace the file.

    Raises:
        ValueError: ``folder`` is no checkpoint, or ``file`` ends otherwise.
        FileExistsError: ``file`` exists.
        ImportError: A ``.pth`` is asked for, and torch is not installed.
        OSError: No permission, no space.
    """
    file = Path(file).expanduser()
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{file} must end in {' or '.join(SUFFIXES)}")
    files.check_new(file, overwrite)
    model = checkpoint.load(folder)
    with files.replacing(file, overwrite=overwrite) as temporary:
        write(model, temporary)
    return file


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
