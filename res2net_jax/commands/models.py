"""``list`` and ``info``: what is known of the models."""

import dataclasses
import re
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import tyro

from res2net_jax import hub
from res2net_jax.arch import Arch
from res2net_jax.command_line import table
from res2net_jax.commands.options import CacheFolder, Model, Text
from res2net_jax.cost import cost, count_parameters
from res2net_jax.metadata import abstract_model, is_checkpoint, locate, read_metadata
from res2net_jax.model import Res2Net
from res2net_jax.preprocess import known_setting
from res2net_jax.provenance import release_of
from res2net_jax.variants import VARIANTS, Preprocessing, Variant, get_variant, list_models


def list_(pattern: Annotated[str, tyro.conf.Positional] = "*", json: bool = False) -> None:
    """python -m res2net_jax list "*50*"

    Lists the models: parameters, multiply-adds at 224x224, published ImageNet accuracy.

    Args:
        pattern: A wildcard.
        json: Print every published fact, as an array.
    """
    names = list_models(pattern)
    if not names:
        raise ValueError(f"no model matches {pattern!r}; models: {', '.join(VARIANTS)}")
    if json:
        print(dumps([dataclasses.asdict(get_variant(name)) for name in names], indent=2))
        return
    rows = [("model", "params (M)", "MACs (G)", "top-1", "top-5")]
    for variant in map(get_variant, names):
        accuracy = variant.imagenet
        sizes = f"{variant.params / 1e6:.2f}", f"{variant.macs / 1e9:.2f}"
        rows.append((variant.name, *sizes, f"{accuracy.top1:.2f}", f"{accuracy.top5:.2f}"))
    print(table(rows))


def info(model: Model, size: Text = None, json: bool = False, cache_dir: CacheFolder = None) -> None:
    """python -m res2net_jax info res2net50_26w_4s --size 224x285

    Shows a model: architecture, cost, published results, and the certificate of its checkpoint.

    Args:
        size: Height x width of the images whose cost is shown, by default the model's own.
        json: Print an object instead.
    """
    asked = parse_size(size) if size else None
    if hub.is_folder(model):
        folder = locate(hub.local_folder(model, cache_dir))
    else:
        folder = hub.cache_folder(get_variant(model).name, cache_dir=cache_dir)
        folder = folder if is_checkpoint(folder) else None
    metadata = None if folder is None else read_metadata(folder)
    if metadata is None:
        described = Res2Net(get_variant(model).arch, name=get_variant(model).name)
    else:
        described = abstract_model(metadata)
    height, width = asked or 2 * ((known_setting(described) or Preprocessing()).size,)
    # What was published is of the released weights, not of others, nor of a relative.
    variant = get_variant(model) if metadata is None else release_of(metadata)
    if variant is not None and described.arch != variant.arch:
        variant = None
    if json:
        print(dumps(_as_json(described, height, width, variant, folder, metadata), indent=2))
        return
    _print_model(described, height, width)
    if variant is not None:
        _print_published(variant)
    if metadata is None:
        print(f"\nNot in the cache yet: load({model!r}) or python -m porting {model} puts it there.")
    else:
        _print_checkpoint(folder, metadata)


def parse_size(text: str) -> tuple[int, int]:
    """``"224x285"`` or ``"224"`` -> height and width."""
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if not match:
        raise ValueError(f"--size is HEIGHTxWIDTH in pixels, e.g. 224x285; got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def _as_json(model, height, width, variant, folder, metadata):
    price = cost(model.eval(), height, width)
    return {
        "name": model.name,
        "num_classes": model.num_classes,
        "in_chans": model.in_chans,
        "arch": dataclasses.asdict(model.arch),
        "params": count_parameters(model),
        "cost": {"height": height, "width": width, "macs": price.macs, "flops": price.flops},
        "published": None if variant is None else dataclasses.asdict(variant),
        "checkpoint": None if metadata is None else {"folder": str(folder), **metadata},
    }


def _print_model(model: Res2Net, height: int, width: int) -> None:
    price = cost(model.eval(), height, width)
    print(f"{model.name}: {model.num_classes} classes, {model.in_chans} channels in")
    if names := model.class_names:
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        print(f"  classes         {', '.join(names[:10])}{more}")
    if setting := model.preprocessing:
        print(f"  pictures        {setting.size}x{setting.size}, crop {setting.crop_pct:g}, {setting.interpolation}")
    print("  " + ", ".join(f"{field.name} {getattr(model.arch, field.name)!r}" for field in dataclasses.fields(Arch)))
    print(f"  parameters      {count_parameters(model):,}")
    print(f"  multiply-adds   {price.macs:,} at {height}x{width} (convolutions and classifier)")
    print(f"  FLOPs           {price.flops:,} at {height}x{width} (the model index's convention)")


def _print_published(variant: Variant) -> None:
    published, setting, recipe = variant.published, variant.preprocessing, variant.recipe
    print(f"\nPublished results of {variant.name} (top-1 / top-5, %)")
    if published:
        print(f"  model index     {published.top1} / {published.top5}, {published.flops:,} FLOPs at 224x285")
    for label, field in _BENCHMARKS.items():
        accuracy = getattr(variant, field)
        print(f"  {label:<15} {accuracy.top1} / {accuracy.top5}")
    print(f"  at {setting.size}x{setting.size}, crop {setting.crop_pct}, {setting.interpolation}")
    if recipe:
        print(
            f"  trained {recipe.epochs} epochs, lr {recipe.lr} ({recipe.schedule}), batch {recipe.batch_size}, "
            f"momentum {recipe.momentum}, weight decay {recipe.weight_decay}, on {recipe.hardware}"
        )
    print(f"  weights {variant.hub_id}, {variant.url}")


def _print_checkpoint(folder: Path, metadata: dict[str, Any]) -> None:
    source, certificate = metadata["source"], metadata["certificate"]
    print(f"\nCheckpoint {folder}")
    for key, value in source.items():
        print(f"  {key:<15} {value}")
    if training := metadata.get("train"):
        print(f"  {'step':<15} {training['step']:,}")
        if result := training["evaluation"]:
            accuracies = f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %"
            print(f"  {'evaluated':<15} {accuracies} of {result['count']:,} examples")
    if not certificate["certified"]:
        print(f"  not certified   {certificate['reason']}")
        return
    print(f"  certified       against {certificate['reference']}; largest relative difference:")
    rows = [("", *next(iter(next(iter(certificate["error"].values())).values())))]
    for dtype, sizes in certificate["error"].items():
        for size, stages in sizes.items():
            rows.append((f"{dtype} {size}", *(f"{error:.0e}" for error in stages.values())))
    print("    " + table(rows).replace("\n", "\n    "))
    print("  " + ", ".join(f"{name} {version}" for name, version in certificate["versions"].items()))


_BENCHMARKS = {
    "ImageNet": "imagenet",
    "ImageNet ReaL": "imagenet_real",
    "ImageNet-V2": "imagenet_v2",
    "ImageNet-A": "imagenet_a",
    "ImageNet-R": "imagenet_r",
    "ImageNet-Sketch": "imagenet_sketch",
}
