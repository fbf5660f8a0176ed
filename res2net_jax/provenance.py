"""Whose weights a checkpoint holds, by its record ``source`` of where they came from."""

import re
import urllib.parse
from pathlib import Path
from typing import Any

from res2net_jax.variants import VARIANTS, Variant

#: Of the released weights, which the Res2Net authors gave away for non-commercial use; as the hub's cards name it.
RELEASE_LICENSE = "res2net-non-commercial"
DERIVED_FROM = "derived from"


def release_of(metadata: dict[str, Any]) -> Variant | None:
    """The variant whose published weights a checkpoint holds; None if they are somebody's own."""
    variant = VARIANTS.get(metadata["model"]["name"])
    return variant if variant and _is_of(variant, metadata["source"]) else None


def ancestor_of(metadata: dict[str, Any]) -> Variant | None:
    """The variant with whose published weights those of a checkpoint began, or whose they are; None if they did not."""
    return release_of(metadata) or VARIANTS.get(str(metadata["source"].get(DERIVED_FROM)))


def with_ancestor(source: dict[str, Any] | None, ancestor: str | None) -> dict[str, Any]:
    """``source``, naming the release that the weights began with; as it is if they are that release."""
    source = dict(source or {})
    named = ancestor is None or _is_of(VARIANTS[ancestor], source)
    return source if named else source | {DERIVED_FROM: ancestor}


def _is_of(variant, source):
    # By where it is on the hub, or by its hash, whose first digits the .pth's name has: anybody may give a file a name.
    if re.search(rf"(^|/){re.escape(variant.hub_id)}([@/].*)?$", str(source.get("origin", ""))):
        return True
    return str(source.get("sha256", "")).startswith(Path(variant.pth).stem.rpartition("-")[2])


def public(source: dict[str, Any]) -> dict[str, Any]:
    """``source`` without what is nobody's business: folders of this machine, and what may be secret in an address."""
    source = dict(source)
    origin, dataset = (str(source.get(key) or "") for key in ("origin", "dataset"))
    if origin:
        source["origin"] = without_secrets(origin) if "://" in origin else Path(origin).name
    if dataset.startswith("folder:"):
        source["dataset"] = f"folder:{Path(dataset.removeprefix('folder:')).name}"
    return source


def without_secrets(address: str) -> str:
    """``address`` without a user's name, and without its query, which may be a signature; of the hub as it is."""
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in ("http", "https"):
        return address
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
