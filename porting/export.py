"""A checkpoint back to a file for timm."""

import os
from pathlib import Path

from porting.convert import state_dict
from res2net_jax import checkpoint


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
    """
    file = Path(file)
    if file.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"{file} must end in .pth or .safetensors")
    if file.exists() and not overwrite:
        raise FileExistsError(f"{file} exists; pass overwrite=True (--force) to replace it")
    arrays = state_dict(checkpoint.load(folder))
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        if file.suffix == ".pth":
            try:
                import torch
            except ImportError as error:
                raise ImportError(
                    "writing a .pth needs torch: pip install 'res2net_jax[port]', or write .safetensors"
                ) from error
            torch.save({key: torch.from_numpy(value.copy()) for key, value in arrays.items()}, temporary)
        else:
            from safetensors.numpy import save_file

            save_file(arrays, temporary, metadata={"format": "pt"})
        os.replace(temporary, file)
    except OSError as error:
        raise checkpoint.explain_write(error, file) from error
    finally:
        temporary.unlink(missing_ok=True)
    return file
