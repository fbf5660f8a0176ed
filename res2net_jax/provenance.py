"""Whose weights a checkpoint holds, by its record ``source`` of where they came from."""

from typing import Any

from res2net_jax.variants import VARIANTS, Variant

#: Of the released weights, which the Res2Net authors gave away for non-commercial use; as the hub's cards name it.
RELEASE_LICENSE = "res2net-non-commercial"
DERIVED_FROM = "derived from"


def release_of(metadata: dict[str, Any]) -> Variant | None:
    """The variant whose published weights a checkpoint holds; None if they are somebody's own."""
    variant, origin = VARIANTS.get(metadata["model"]["name"]), metadata["source"].get("origin", "")
    return variant if variant and (variant.pth in origin or variant.hub_id in origin) else None


def ancestor_of(metadata: dict[str, Any]) -> Variant | None:
    """The variant with whose published weights those of a checkpoint began, or whose they are; None if they did not."""
    return release_of(metadata) or VARIANTS.get(metadata["source"].get(DERIVED_FROM))


def with_ancestor(source: dict[str, Any] | None, ancestor: str | None) -> dict[str, Any]:
    """``source``, naming the release that the weights began with; as it is if it says where they are from."""
    source = dict(source or {})
    return source if ancestor is None or "origin" in source else source | {DERIVED_FROM: ancestor}
