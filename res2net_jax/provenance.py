"""Whose weights a checkpoint holds, by its record ``source`` of where they came from."""

import re
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
    origin = str(source.get("origin", ""))
    if re.fullmatch(rf"hf://{re.escape(variant.hub_id)}(@.*)?", origin):
        return True
    digest = Path(variant.pth).stem.rpartition("-")[2]  # the first digits of it; anybody may give a file that name
    return variant.pth in origin and str(source.get("sha256", "")).startswith(digest)
