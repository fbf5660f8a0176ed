"""Models on the Hugging Face hub: ``push_to_hub`` puts one there, ``load("hf://user/name@revision")`` takes it."""

import contextlib
import json
import os
import re
import socket
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from res2net_jax import checkpoint, files, hub
from res2net_jax.arch import Arch, changes
from res2net_jax.init import require_model
from res2net_jax.metadata import describe, is_checkpoint, read_metadata
from res2net_jax.model import Res2Net
from res2net_jax.model_card import model_card
from res2net_jax.preprocess import known_setting
from res2net_jax.provenance import public
from res2net_jax.variants import VARIANTS

_ADDRESS = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_FOLDER = "checkpoint"  # in the repository
_NOT_FOR_TIMM = ("aa_layer", "attn_layer")  # classes there, which its config cannot name


def push_to_hub(
    model: Res2Net | str | os.PathLike,
    repo_id: str,
    *,
    license: str | None = None,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Shares ``model`` on the Hugging Face hub, in one commit: all of it is there, or nothing.

    The repository, made if need be, gets the Orbax checkpoint; ``model.safetensors`` and ``config.json``, from which
    ``timm.create_model("hf-hub:user/name", pretrained=True)`` makes the same model (unless it has options or
    a number of stages that timm's cannot); and a ``README.md``: architecture, figures, certificate, licence, how to
    load it.

    Args:
        model: A model, a checkpoint folder, or the name of a variant. A folder's source, certificate and evaluation go
            with it; a model's own only if its weights are those of its release in the cache.
        repo_id: ``"user/name"``.
        license: Of the weights, as the hub names it, e.g. ``"apache-2.0"``. The released weights keep their own, which
            is also the default for weights that began as such.
        private: For a repository that is made.
        token: By default ``$HF_TOKEN``, or what ``hf auth login`` stored.
        revision: A branch, made if need be; by default ``main``.

    Returns:
        The address of the commit.

    Raises:
        ValueError: A name that is none, a fused model, or a license for released weights.
        PermissionError: The hub does not know you, or does not let you write there.
        ConnectionError: No network, or the hub failed. Nothing was committed.
    """
    import huggingface_hub
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    if repo_id.count("/") != 1:
        raise ValueError(f"a model is shared as user/name; got {repo_id!r}")
    model, metadata = _described(model)
    address = f"hf://{repo_id}" + (f"@{revision}" if revision else "")
    with tempfile.TemporaryDirectory(prefix="res2net_jax-") as folder, _plain_errors(repo_id, "write"):
        _write(model, metadata, Path(folder), address, license)
        require_host(repo_id)
        api = huggingface_hub.HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=f"{model.name} by res2net_jax",
            ignore_patterns=".*",
            # Of the model that was there: its checkpoint's files have names of their own, and this one may have none
            # for timm.
            delete_patterns=[f"{_FOLDER}/*", "config.json", "model.safetensors"],
        )
    return str(commit.commit_url)


def fetch(address: str, cache_dir: str | os.PathLike | None = None) -> Path:
    """The checkpoint folder at ``address``, ``"hf://user/name"`` or ``"hf://user/name@revision"``, on this machine.

    The cache keeps each commit of a repository; without network it gives the newest one it has.

    Raises:
        ValueError: No such address, or what is there was not pushed by :func:`push_to_hub`.
        FileNotFoundError: No such repository or revision, or one that is private.
        ConnectionError: No network, and the cache does not have it.
    """
    import huggingface_hub

    match = _ADDRESS.fullmatch(address)
    if not match:
        raise ValueError(f"expected hf://user/name or hf://user/name@revision; got {address!r}")
    repo, revision = match["repo"], match["revision"]
    with _plain_errors(repo, "read", revision):
        try:
            require_host(repo)
            offline = False
        except ConnectionError:
            offline = True
        snapshot = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            cache_dir=files.cache_home(cache_dir) / "hub",
            allow_patterns=f"{_FOLDER}/*",
            local_files_only=offline,
        )
    folder = Path(snapshot) / _FOLDER
    if not is_checkpoint(folder):
        raise ValueError(
            f"{address} holds no checkpoint by res2net_jax.push_to_hub; the weights of a PyTorch model are loaded by "
            f"its variant's name and source={repo!r}"
        )
    return folder


def require_host(repo: str) -> None:
    """ConnectionError at once if the hub is unknown here, where its client would try for half a minute."""
    from huggingface_hub import constants

    if not urllib.request.getproxies():
        host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            raise ConnectionError(f"cannot reach the hub for {repo} ({host}: {error.strerror})") from error


def _described(model):
    """The model and the metadata to store with it."""
    if isinstance(model, Res2Net):
        return model, _public(_of_release(model) or describe(model))
    if not isinstance(model, str | os.PathLike):
        require_model(model)
    folder = hub.local_folder(model) if hub.is_folder(model) else hub.cached(model)
    metadata = read_metadata(folder)
    evaluation = (metadata.get("train") or {}).get("evaluation")
    if evaluation:
        metadata["source"]["evaluation"] = evaluation
    return checkpoint.load(folder), _public(metadata)


def _public(metadata):
    return metadata | {"source": public(metadata["source"])}


def _of_release(model):
    """The metadata of the cached release whose weights ``model`` has, if so: its terms and its certificate hold."""
    folder = hub.cache_folder(model.name)
    if model.name not in VARIANTS or not is_checkpoint(folder):
        return None
    mine, theirs = checkpoint.arrays(model), checkpoint.arrays(checkpoint.load(folder))
    same = mine.keys() == theirs.keys() and all(np.array_equal(mine[path], theirs[path]) for path in mine)
    return read_metadata(folder) if same else None


def _write(model: Res2Net, metadata: dict[str, Any], folder: Path, address: str, license: str | None) -> None:
    """What goes to the repository."""
    hub.import_porting()
    import porting.export

    record = {"source": metadata["source"], "certificate": metadata["certificate"]}
    checkpoint.save(model, folder / _FOLDER, **record)
    config = _timm_config(model)
    if config:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        porting.export.write(model, folder / "model.safetensors")
    card = model_card(metadata, address, license=license, timm=config is not None)
    (folder / "README.md").write_text(card, "utf-8")


def _timm_config(model: Res2Net) -> dict[str, Any] | None:
    """What timm makes the model of; None if it cannot."""
    changed = changes(model.arch, VARIANTS[model.name].arch if model.name in VARIANTS else Arch())
    if any(getattr(model.arch, field) for field in _NOT_FOR_TIMM) or len(model.arch.layers) != 4:
        return None
    if "scale" in changed:
        changed["block_args"] = {"scale": changed.pop("scale")}
    setting = known_setting(model)
    names = {} if model.class_names is None else {"label_names": list(model.class_names)}
    pretrained = (
        {
            "input_size": [model.in_chans, setting.size, setting.size],
            "crop_pct": setting.crop_pct,
            "interpolation": setting.interpolation,
            "mean": list(setting.mean),
            "std": list(setting.std),
        }
        if setting
        else {}
    )
    return {
        "architecture": model.name if model.name in VARIANTS else "res2net50_26w_4s",
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": changed | ({"in_chans": model.in_chans} if model.in_chans != 3 else {}),
        "pretrained_cfg": pretrained
        | {
            "num_classes": model.num_classes,
            "first_conv": "conv1.0" if model.arch.stem_type else "conv1",
            "classifier": "fc",
        },
    } | names


@contextlib.contextmanager
def _plain_errors(repo: str, verb: str, revision: str | None = None) -> Iterator[None]:
    """What the hub's client raises, in one line."""
    from huggingface_hub import errors

    log_in = "log in (hf auth login, or $HF_TOKEN)"
    try:
        yield
    except errors.LocalTokenNotFoundError as error:
        raise PermissionError(f"the hub wants to know who you are: {log_in}, or pass token=") from error
    except errors.LocalEntryNotFoundError as error:
        if _status(error.__cause__) in (401, 403, 404):
            raise FileNotFoundError(f"the hub has no {repo}, or it is private: {log_in}") from error
        raise ConnectionError(f"cannot reach the hub for {repo}, and the cache does not have it") from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo} has no revision {revision or 'main'}") from error
    except errors.HTTPError as error:
        if verb == "write" and _status(error) in (401, 403):
            raise PermissionError(
                f"the hub does not let you write {repo} (HTTP {_status(error)}): {log_in} as somebody who may"
            ) from error
        if _status(error) in (401, 403, 404):
            raise FileNotFoundError(f"the hub has no {repo}, or it is private: {log_in}") from error
        raise ConnectionError(f"the hub failed to {verb} {repo}: {files.first_line(error)}") from error
    except RuntimeError as error:  # an upload's
        raise ConnectionError(
            f"the hub failed to {verb} {repo}: {files.first_line(error.__cause__ or error)}"
        ) from error


def _status(error):
    return getattr(getattr(error, "response", None), "status_code", None)
