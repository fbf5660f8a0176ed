"""The command line: ``python -m porting NAME...`` ports and certifies, ``python -m porting export`` goes back."""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from porting.export import SUFFIXES
from porting.parity import TOLERANCE, worst
from porting.release import port
from res2net_jax import checkpoint, files, formats
from res2net_jax.backend import use_compilation_cache
from res2net_jax.command_line import main, table
from res2net_jax.metadata import read_metadata
from res2net_jax.variants import VARIANTS


def port_command(
    names: Annotated[tuple[str, ...], tyro.conf.Positional],
    source: str | None = None,
    output: Path | None = None,
    all: bool = False,
    verify: bool = True,
    check_hash: bool = True,
    force: bool = False,
    cache_dir: Path | None = None,
) -> None:
    """python -m porting res2net50_14w_8s

    Ports PyTorch releases to Orbax checkpoints and certifies them against torch. And back, for timm: python -m porting
    export FOLDER FILE.safetensors

    Exit code: 0 done; 2 a mistake, or a model that was not ported; 130 interrupted.

    Args:
        names: Models, e.g. res2net50_14w_8s.
        source: A .pth or .safetensors file, a URL or a hub id, instead of the release.
        output: Folder of the checkpoint (for several models, the folder of their folders); by default the cache.
        all: Port every model.
        verify: Compare with timm in float64 and float32, and store the certificate.
        check_hash: Compare the file's SHA-256 with the prefix in its name.
        force: Replace a checkpoint at the output.
        cache_dir: Cache folder, by default $RES2NET_JAX_HOME or the platform's own.
    """
    if all == bool(names):
        raise ValueError(f"give the names of models, or --all; models: {', '.join(VARIANTS)}")
    names = tuple(VARIANTS) if all else names
    if source and len(names) > 1:
        raise ValueError("--source is the weights of one model; name just that one")
    rows = [("model", *(f"{dtype} error" for dtype in TOLERANCE), "certified", "folder")]
    failed = []
    for name in names:
        target = output / name if output and len(names) > 1 else output
        try:
            folder = port(name, source, target, verify, check_hash=check_hash, overwrite=force, cache_dir=cache_dir)
        except (ValueError, OSError, ImportError) as error:
            if len(names) == 1:
                raise
            print(f"error: {name}: {error}", file=sys.stderr)
            failed.append(name)
            continue
        certificate = read_metadata(folder)["certificate"]
        if certificate["certified"]:
            errors = [f"{worst(certificate, dtype):.1e}" for dtype in TOLERANCE]
            rows.append((name, *errors, "yes", str(folder)))
        else:
            rows.append((name, *("-" for _ in TOLERANCE), "no", str(folder)))
            print(f"{name}: not certified: {certificate['reason']}", file=sys.stderr)
    if len(rows) > 1:
        print(table(rows))
    if failed:
        raise ValueError(f"{len(failed)} of {len(names)} models were not ported: {', '.join(failed)}")


def export_command(
    folder: Annotated[Path, tyro.conf.Positional],
    file: Annotated[Path, tyro.conf.Positional],
    force: bool = False,
) -> None:
    """python -m porting export checkpoints/mine mine.safetensors

    Writes a checkpoint as a state dict that timm loads strictly.

    Args:
        folder: A checkpoint.
        file: Ends in .pth (needs torch) or .safetensors.
        force: Replace the file.
    """
    if file.suffix not in SUFFIXES:
        raise ValueError(
            f"{file} must end in {' or '.join(SUFFIXES)}; python -m res2net_jax export writes other formats"
        )
    files.check_new(file.expanduser(), force)
    print(formats.export(checkpoint.load(folder), file, overwrite=force))


def command(arguments: list[str]) -> None:
    if arguments[:1] == ["export"]:
        tyro.cli(export_command, prog="python -m porting export", args=arguments[1:])
    else:
        tyro.cli(port_command, prog="python -m porting", args=arguments)


if __name__ == "__main__":
    use_compilation_cache()
    main(command)
