"""One release, from its source to a certified checkpoint."""

import importlib.util
import os
import shutil
from pathlib import Path

import numpy as np

from porting import timm_config
from porting.convert import load_state_dict, state_dict
from porting.parity import certify
from porting.sources import Release, fetch, read_file
from res2net_jax import checkpoint, files
from res2net_jax.arch import EXPANSION, Arch, changes, override
from res2net_jax.hub import cache_folder, in_the_weights
from res2net_jax.metadata import is_checkpoint
from res2net_jax.model import Res2Net
from res2net_jax.variants import Variant, get_variant


def port(
    name: str,
    source: str | os.PathLike | None = None,
    output: str | os.PathLike | None = None,
    verify: bool = True,
    *,
    check_hash: bool = True,
    overwrite: bool = False,
    cache_dir: str | os.PathLike | None = None,
    **arch,
) -> Path:
    """Ports the PyTorch weights of ``name`` to an Orbax checkpoint.

    Args:
        name: The variant.
        source: See :func:`porting.read`. By default the release: its safetensors on the hub, else its ``.pth``. Of a
            hub id timm's ``config.json`` is read as well: options, names of classes, and how pictures are made.
        output: Folder of the checkpoint; by default the one in the cache that :func:`res2net_jax.load` looks in,
            which is replaced.
        verify: Certify the model against timm; needs torch and timm, and the checkpoint says if they are missing.
        check_hash: Compare the file's SHA-256 with the prefix in its name.
        overwrite: Replace a checkpoint at ``output``.
        cache_dir: As in :func:`res2net_jax.load`.
        **arch: Fields of :class:`res2net_jax.Arch` in which the weights' model differs from the variant, e.g.
            ``attn_layer="se"``. A classifier over twice the features shows that ``global_pool`` is ``"catavgmax"``.
            Those that change no array, such as ``act_layer``, need an ``output``; to ``load`` they are given then.

    Returns:
        The folder.

    Raises:
        ValueError: Weights that are damaged, unsafe, of another model, not finite, or that compute
            something else than in torch. Nothing is written.
        FileExistsError: ``output`` exists.
        OSError: No network, no permission, no space.
    """
    variant = get_variant(name)
    name = variant.name
    asked = override(variant.arch, **arch)
    given = changes(asked, variant.arch)
    if output is not None:
        files.require_checkpoint_path(output)
        checkpoint.require_free(Path(output).expanduser(), overwrite)
    elif others := given.keys() - in_the_weights(given).keys():
        raise ValueError(f"{', '.join(sorted(others))} is in no array, so give it to load; or name an output")

    release = _fetch(variant, source, check_hash, cache_dir)
    arrays = read_file(release.path)
    if _is_of_catavgmax(asked, arrays) and "global_pool" not in arch:
        asked = override(asked, global_pool="catavgmax")
    config = {} if source is None else timm_config.read(release, cache_dir)
    model = _model_for(name, timm_config.apply(config, asked, arch), arrays)
    model.class_names = timm_config.class_names(config, model.num_classes)
    model.preprocessing = timm_config.preprocessing(config, variant.preprocessing)
    load_state_dict(model, arrays)
    if verify:
        certificate = certify(name, state_dict(model), **changes(model.arch, variant.arch))
    else:
        certificate = {"certified": False, "reason": f"ported without a check; python -m porting {name} makes one"}
    record = {"origin": release.origin, "file": release.path.name, "sha256": release.sha256, "bytes": release.size}
    if output is not None:
        return checkpoint.save(model, output, overwrite=overwrite, source=record, certificate=certificate)
    folder = cache_folder(name, source, cache_dir, given)
    with files.lock(folder):
        if folder.exists() and not is_checkpoint(folder):
            shutil.rmtree(folder)  # the cache is ours: what is no checkpoint there is a damaged one
        return checkpoint.save(model, folder, overwrite=True, source=record, certificate=certificate)


def _fetch(variant: Variant, source, check_hash, cache_dir) -> Release:
    if source is not None:
        return fetch(source, check_hash=check_hash, cache_dir=cache_dir)
    failures = []
    for candidate in (variant.hub_id, variant.url):
        if candidate.endswith(".pth") and importlib.util.find_spec("torch") is None:
            failures.append(f"  {candidate} was not tried: reading it needs torch (pip install 'res2net_jax[port]')")
            continue
        try:
            return fetch(candidate, check_hash=check_hash, cache_dir=cache_dir)
        except (ConnectionError, FileNotFoundError) as error:
            failures.append(f"  {error}")
    raise ConnectionError(
        f"the weights of {variant.name} could not be downloaded:\n" + "\n".join(failures) + "\n"
        f"Fetch {variant.pth} or its model.safetensors elsewhere and give the file as source= (--source)"
    )


def _is_of_catavgmax(arch: Arch, arrays: dict[str, np.ndarray]) -> bool:
    head = arrays.get("fc.weight")
    return head is not None and head.ndim == 2 and head.shape[1] == 2 * arch.channels[-1] * EXPANSION


def _model_for(name: str, arch: Arch, arrays: dict[str, np.ndarray]) -> Res2Net:
    """An abstract model with as many classes and channels as the weights have."""
    options = {}
    head = arrays.get("fc.weight")
    first = arrays.get("conv1.0.weight" if arch.stem_type else "conv1.weight")
    if head is not None and head.ndim == 2:
        options["num_classes"] = head.shape[0]
    elif not any(key.startswith("fc.") for key in arrays):
        options["num_classes"] = 0
    if first is not None and first.ndim == 4:
        options["in_chans"] = first.shape[1]
    return Res2Net(arch, name=name, **options)
