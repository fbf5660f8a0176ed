"""What timm keeps on the hub beside a model's weights, in ``config.json``: its options, its classes, its pictures."""

import dataclasses
import json
import re
import warnings
from collections.abc import Sequence
from typing import Any

from porting import download
from porting.sources import Release
from res2net_jax.arch import Arch, override
from res2net_jax.inference import imagenet_classes
from res2net_jax.variants import Preprocessing


def read(release: Release, cache_dir=None) -> dict[str, Any]:
    """The config beside ``release``; empty for what is not from the hub, or has none there."""
    on_hub = re.fullmatch(r"hf://(.+)@(\w+)", release.origin)
    if on_hub is None:
        return {}
    try:
        config = json.loads(download.from_hub(*on_hub.groups(), "config.json", cache_dir=cache_dir).read_bytes())
    except FileNotFoundError:
        return {}
    except (ConnectionError, ValueError) as error:
        warnings.warn(
            f"config.json of {release.origin} cannot be read ({error}); its classes, its options and how its pictures "
            "are made are taken to be those of the release",
            stacklevel=3,
        )
        return {}
    return config if isinstance(config, dict) else {}


def apply(config: dict[str, Any], arch: Arch, given: Sequence[str]) -> Arch:
    """``arch`` with the options that timm's model was made with, except the fields that were ``given``.

    Raises:
        ValueError: An option that no model of ours has, such as another norm.
    """
    # The first two the weights' shapes tell, and the third is for fresh ones.
    others = ("num_classes", "in_chans", "zero_init_last", *given)
    try:
        options = {"global_pool": config.get("global_pool"), **(config.get("model_args") or {})}
        options |= options.pop("block_args", None) or {}
        return override(arch, **{key: _value(v) for key, v in options.items() if v is not None and key not in others})
    except (TypeError, ValueError) as error:
        raise ValueError(f"timm's config.json, beside the weights, asks for another model: {error}") from error


def preprocessing(config: dict[str, Any], usual: Preprocessing) -> Preprocessing | None:
    """How pictures are made; None as ``usual``. With a warning where it is something that we do not have."""
    theirs = _pretrained(config)
    fields = [field.name for field in dataclasses.fields(Preprocessing) if field.name in theirs]
    try:
        _, height, width = theirs.get("input_size", (3, usual.size, usual.size))
        if height != width or theirs.get("crop_mode", "center") != "center":
            raise ValueError(f"a crop of {height} x {width}, {theirs.get('crop_mode', 'center')}")
        setting = dataclasses.replace(usual, size=height, **{field: theirs[field] for field in fields})
    except (TypeError, ValueError) as error:
        warnings.warn(
            f"timm makes this model's pictures in a way that is not available here ({error}); they are made as for the "
            "release, unless you set model.preprocessing",
            stacklevel=3,
        )
        return None
    return None if setting == usual else setting


def class_names(config: dict[str, Any], num_classes: int) -> tuple[str, ...] | None:
    """The names of the classes; None where there are none or not as many, and for ImageNet's synsets."""
    names = config.get("label_names") or _pretrained(config).get("label_names")
    if isinstance(names, dict) and names.keys() == {str(i) for i in range(num_classes)}:
        names = [names[str(i)] for i in range(num_classes)]
    fits = isinstance(names, list) and len(names) == num_classes and all(isinstance(name, str) for name in names)
    return tuple(names) if fits and names != [synset for synset, _ in imagenet_classes()] else None


def _pretrained(config):
    found = config.get("pretrained_cfg")
    return found if isinstance(found, dict) else {}


def _value(value):
    return tuple(value) if isinstance(value, list) else value
