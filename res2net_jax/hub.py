"""A name -> a model: fresh by :func:`create`, trained by :func:`load`."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from res2net_jax import checkpoint, files
from res2net_jax.arch import changes, override
from res2net_jax.features import FeaturePyramid
from res2net_jax.init import initialize
from res2net_jax.metadata import is_checkpoint
from res2net_jax.model import Res2Net
from res2net_jax.variants import TAG, VARIANTS, get_variant

# What to port a release raises; the first that fits.
_RAISED = (ValueError, FileNotFoundError, PermissionError, ConnectionError, ImportError)


def create(
    name: str,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    dtype: jnp.dtype | None = None,
    param_dtype: jnp.dtype = jnp.float32,
    rngs: int | nnx.Rngs | jax.Array = 0,
    zero_init_last: bool = True,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    **arch,
) -> Res2Net | FeaturePyramid:
    """A freshly initialised model in train mode.

    Args:
        name: A variant, e.g. ``"res2net50_26w_4s"``; see :func:`list_models`.
        num_classes: Width of the classifier; 0 for none.
        in_chans: Channels of the images.
        dtype: Computation type, e.g. ``jnp.bfloat16``; by default that of images and weights.
        param_dtype: Type of the weights.
        rngs: Seed, also a key of ``jax.random.key``. The same seed gives the same weights, whatever the type.
        zero_init_last: Zero the last norm of each block, as timm does by default.
        features_only: Make it a :class:`FeaturePyramid`: a list of maps instead of logits.
        out_indices: Which maps; by default all five.
        **arch: Fields of :class:`Arch` to change, e.g. ``layers=(2, 2, 2, 2), base_width=16, scale=1``.

    Raises:
        ValueError: No such model, option or value.
    """
    variant = get_variant(name)
    model = Res2Net(
        override(variant.arch, **arch),
        num_classes=num_classes,
        in_chans=in_chans,
        dtype=dtype,
        param_dtype=param_dtype,
        name=variant.name,
    )
    return _as_asked(initialize(model, rngs, zero_init_last=zero_init_last), features_only, out_indices)


def load(
    name_or_folder: str | os.PathLike,
    *,
    source: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    check_hash: bool = True,
    dtype: jnp.dtype | None = None,
    param_dtype: jnp.dtype | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
    rngs: int | nnx.Rngs | jax.Array = 0,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    **arch,
) -> Res2Net | FeaturePyramid:
    """A trained model in eval mode.

    A folder is restored. A name is restored from the cache; if it is not there yet, its release is
    downloaded, verified, ported and stored first. Several processes may do so at once, and a kill at
    any moment leaves a cache that works. Needs no torch unless ``source`` is a ``.pth`` file.

    Args:
        name_or_folder: A variant, a checkpoint (by :func:`save`, ``python -m porting`` or the trainer; of a run the
            newest one), or ``"hf://user/name"`` or ``"hf://user/name@revision"``, one on the hub (by
            :func:`push_to_hub`). A folder that is called as a variant is ``"./name"``.
        source: For a name, where to take the weights from instead of the release: a ``.pth`` or
            ``.safetensors`` file, a URL, or a hub id such as ``"timm/res2net50_14w_8s.in1k"``. What is at a URL or on
            the hub is taken once; ``porting.port(name, source)`` takes it anew.
        cache_dir: Cache folder; else ``$RES2NET_JAX_HOME``, else the platform's own. Without it the release's file
            itself goes to the hub's cache (``$HF_HOME``), which timm shares.
        check_hash: Compare the source's SHA-256 with the prefix in its file name, if there is one.
        dtype: Computation type; by default that of images and weights.
        param_dtype: Type of the weights; by default as stored (float32).
        num_classes: Another number than the checkpoint's gives a fresh classifier, 0 none.
        in_chans: Another number than 3 fits the first convolution (:func:`res2net_jax.adapt.fit_first_conv`).
        sharding: Where the arrays go, and stay, e.g. ``NamedSharding(mesh, PartitionSpec())``; by default to JAX's
            default device, from which they follow other arrays.
        rngs: Seed of a fresh classifier, as of :func:`create`.
        features_only: Make it a :class:`FeaturePyramid`: a list of maps instead of logits.
        out_indices: Which maps; by default all five.
        **arch: Fields of :class:`Arch` to change, e.g. ``output_stride=8``; the weights must still fit. With
            ``source`` also those in which its model differs, e.g. ``attn_layer="se"``.

    Raises:
        ValueError: No such model; or weights that are damaged, unsafe, of another model, or not as published.
        FileNotFoundError: No such folder or file.
        OSError: No network, no permission, no space.
        ImportError: A ``.pth``, and no torch.
    """
    options = {
        "num_classes": num_classes,
        "in_chans": in_chans,
        "dtype": dtype,
        "param_dtype": param_dtype,
        "sharding": sharding,
        "rngs": rngs,
        "arch": arch,
    }
    if is_folder(name_or_folder):
        if source is not None:
            raise ValueError(f"{name_or_folder} is a checkpoint folder; source= goes with a model name")
        require_no_address(name_or_folder)
        model = checkpoint.load(local_folder(name_or_folder, cache_dir), **options)
    else:
        variant = get_variant(name_or_folder)
        asked = override(variant.arch, **arch)  # a mistake in the options shows before anything is downloaded
        # The release is of the plain model, a file may be of the one asked for.
        theirs = {} if source is None else in_the_weights(changes(asked, variant.arch))
        folder = cached(variant.name, source=source, cache_dir=cache_dir, check_hash=check_hash, **theirs)
        model = checkpoint.load(folder, **options)
    return _as_asked(model, features_only, out_indices)


def in_the_weights(arch: Mapping[str, Any]) -> dict[str, Any]:
    """Those fields of :class:`Arch` that decide which arrays a model has, but for its classifier's."""
    elsewhere = ("act_layer", "aa_layer", "output_stride", "global_pool")
    elsewhere += ("drop_rate", "drop_path_rate", "drop_block_rate")
    return {field: value for field, value in arch.items() if field not in elsewhere}


def _as_asked(model, features_only, out_indices):
    if features_only:
        return FeaturePyramid(model, out_indices)
    if out_indices is not None:
        raise ValueError("out_indices picks maps, which features_only=True returns; pass both or neither")
    return model


def cached(name: str, *, source=None, cache_dir=None, check_hash: bool = True, **arch) -> Path:
    """The folder of ``name``'s checkpoint in the cache, ported now if it is not there yet; ``arch`` as in ``port``."""
    name = get_variant(name).name
    folder = cache_folder(name, source, cache_dir, arch)
    # A writer that was killed after the checkpoint had got its name left its temporary folder.
    to_clear = files.leftovers(folder) and os.access(folder.parent, os.W_OK)
    if is_checkpoint(folder) and not to_clear:
        return folder
    if jax.process_count() > 1:
        _cached_by_a_child(name, source, cache_dir, check_hash, arch)
        return folder
    porting = import_porting()
    with files.lock(folder):
        files.remove_leftovers(folder)
        if not is_checkpoint(folder):
            porting.port(name, source, verify=False, check_hash=check_hash, cache_dir=cache_dir, **arch)
    return folder


def import_porting():
    """The package; ImportError that says so if a module of the user's, in the working directory, hides it."""
    import porting

    if not hasattr(porting, "port"):
        raise ImportError(
            f"{porting.__file__} hides the package porting of res2net_jax; rename it, or start Python with -P, which "
            "keeps the working directory out of the modules' path"
        )
    return porting


def _cached_by_a_child(name, source, cache_dir, check_hash, arch):
    """Orbax writes in all processes of a job or in none; whether this one must write depends on its own disk."""
    options = {"source": source, "cache_dir": cache_dir}
    options = {key: None if value is None else os.fspath(value) for key, value in options.items()} | arch
    code = (
        "import json, sys; from res2net_jax import hub\n"
        f"try: hub.cached({name!r}, check_hash={check_hash!r}, **{options!r})\n"
        "except Exception as error:\n"
        "    print(json.dumps([str(error), *(kind.__name__ for kind in type(error).__mro__)]))\n"
        "    sys.exit(1)"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, text=True
    )
    if child.returncode:
        try:
            message, *kinds = json.loads(child.stdout.splitlines()[-1])
        except (IndexError, ValueError):  # killed, say
            raise OSError(f"the process that ported {name} ended with {child.returncode}") from None
        raise next((kind for kind in _RAISED if kind.__name__ in kinds), OSError)(message)


def cache_folder(name: str, source=None, cache_dir=None, arch: Mapping[str, Any] | None = None) -> Path:
    """Where the cache keeps ``name``; another source than the release, or architecture, has a folder of its own."""
    return files.cache_home(cache_dir) / "models" / cache_key(name, source, arch)


def cache_key(name: str, source: str | os.PathLike | None = None, arch: Mapping[str, Any] | None = None) -> str:
    """The name of the cache's folder: ``name`` for the release, else ``name@`` and twelve hex digits of a SHA-256.

    It is of the source (a file's content, else the address) and of ``arch``.
    """
    if source is None:
        return name
    path = Path(source).expanduser()
    if path.is_file():
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    else:
        digest = hashlib.sha256(str(source).encode())
    if arch:
        digest.update(repr(sorted(arch.items())).encode())
    return f"{name}@{digest.hexdigest()[:12]}"


def local_folder(folder: str | os.PathLike, cache_dir: str | os.PathLike | None = None) -> str | os.PathLike:
    """``folder``; if it is an address on the hub, hf://user/name, where the cache has it now."""
    if isinstance(folder, str) and folder.startswith("hf://"):
        from res2net_jax import sharing

        return sharing.fetch(folder, cache_dir)
    return folder


def require_no_address(folder: str | os.PathLike) -> None:
    """FileNotFoundError for what is not a folder, but a URL or in timm an address."""
    if re.match("https?://", os.fspath(folder)):
        raise FileNotFoundError(f"there is no folder {folder}; weights at an address are load(NAME, source=ADDRESS)")
    match = re.fullmatch(r"(?:hf[-_]hub:(?=[\w-]+/)|(?=timm/))([\w-]+/[\w.-]+)", os.fspath(folder))
    if match and not Path(folder).exists():
        raise FileNotFoundError(
            f"there is no folder {folder}; of timm's weights on the hub the name comes first, "
            f'load(NAME, source="{match[1]}"), and what push_to_hub wrote is load("hf://{match[1]}")'
        )


def is_folder(name_or_folder) -> bool:
    if not isinstance(name_or_folder, str | os.PathLike) or not os.fspath(name_or_folder):
        raise ValueError(f"expected a model name or a checkpoint folder; got {name_or_folder!r}")
    is_name = isinstance(name_or_folder, str) and name_or_folder.removesuffix(TAG) in VARIANTS
    if is_name:  # also where a folder is called so
        return False
    path = Path(name_or_folder)
    if path.expanduser().is_file():
        raise ValueError(
            f"{path} is a file; weights in a file go with the name of their model: "
            f'load(NAME, source="{path}"), or first python -m porting NAME --source {path} --output FOLDER'
        )
    if isinstance(name_or_folder, os.PathLike):
        return True
    return os.sep in name_or_folder or name_or_folder.startswith((".", "~")) or path.is_dir()
