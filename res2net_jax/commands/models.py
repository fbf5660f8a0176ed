"""``list`` and ``info``: what is known of the models."""

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any

import tyro

from res2net_jax import checkpoint, hub
from res2net_jax.arch import Arch
from res2net_jax.command_line import table
from res2net_jax.cost import cost
from res2net_jax.model import Res2Net
from res2net_jax.variants import VARIANTS, Variant, get_variant, list_models


def list_(pattern: Annotated[str, tyro.conf.Positional] = "*") -> None:
    """Lists the models: size, cost at 224x224, ImageNet accuracy.

    Args:
        pattern: A wildcard, e.g. "*50*".
    """
    names = list_models(pattern)
    if not names:
        raise ValueError(f"no model matches {pattern!r}; models: {', '.join(VARIANTS)}")
    rows = [("model", "params (M)", "MACs (G)", "top-1", "top-5")]
    for variant in map(get_variant, names):
        accuracy = variant.imagenet
        sizes = f"{variant.params / 1e6:.2f}", f"{variant.macs / 1e9:.2f}"
        rows.append((variant.name, *sizes, f"{accuracy.top1:.2f}", f"{accuracy.top5:.2f}"))
    print(table(rows))


def info(model: Annotated[str, tyro.conf.Positional], size: str = "224x224", cache_dir: Path | None = None) -> None:
    """Shows a model: architecture, cost, published results, and the certificate of its checkpoint.

    Args:
        model: A name, a checkpoint folder, or hf://user/name.
        size: Height x width of the images whose cost is shown.
        cache_dir: Cache folder, by default $RES2NET_JAX_HOME or the platform's own.
    """
    height, width = parse_size(size)
    if hub.is_folder(model):
        folder = checkpoint.locate(hub.local_folder(model, cache_dir))
    else:
        variant = get_variant(model)
        folder = hub.cache_folder(variant.name, cache_dir=cache_dir)
        if not checkpoint.is_checkpoint(folder):
            _print_model(Res2Net(variant.arch, name=variant.name), height, width)
            _print_published(variant)
            print(f"\nNot in the cache yet: load({variant.name!r}) or python -m porting {variant.name} puts it there.")
            return
    metadata = checkpoint.read_metadata(folder)
    described = checkpoint.abstract_model(metadata)
    _print_model(described, height, width)
    variant = VARIANTS.get(described.name)
    if variant is not None and described.arch == variant.arch:
        _print_published(variant)
    _print_checkpoint(folder, metadata)


def parse_size(text: str) -> tuple[int, int]:
    """``"224x285"`` or ``"224"`` -> height and width."""
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if not match:
        raise ValueError(f"--size is HEIGHTxWIDTH in pixels, e.g. 224x285; got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def _print_model(model: Res2Net, height: int, width: int) -> None:
    leaves = checkpoint.arrays(model)
    parameters = sum(leaf.size for path, leaf in leaves.items() if not path.endswith((".mean", ".var")))
    price = cost(model.eval(), height, width)
    print(f"{model.name}: {model.num_classes} classes, {model.in_chans} channels in")
    print("  " + ", ".join(f"{field.name} {getattr(model.arch, field.name)!r}" for field in dataclasses.fields(Arch)))
    print(f"  parameters      {parameters:,}")
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
