"""A checkpoint back to a file for timm."""

import os
from pathlib import Path

from porting.convert import state_dict, to_numpy
from res2net_jax import checkpoint, files


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
    if file.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"{file} must end in .pth or .safetensors")
    if file.exists() and not overwrite:
        raise FileExistsError(f"{file} exists; pass overwrite=True (--force) to replace it")
    arrays = {key: to_numpy(value) for key, value in state_dict(checkpoint.load(folder)).items()}
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with files.writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            (_write_torch if file.suffix == ".pth" else _write_safetensors)(arrays, temporary)
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
    return file


def _write_torch(arrays, file):
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "writing a .pth needs torch: pip install 'res2net_jax[port]', or write .safetensors"
        ) from error
    torch.save({key: torch.from_numpy(value.copy()) for key, value in arrays.items()}, file)


def _write_safetensors(arrays, file):
    import safetensors.numpy

    try:
        safetensors.numpy.save_file(arrays, file, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(f"cannot write {file}: {error}") from error
