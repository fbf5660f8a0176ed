"""The README of a shared model: what it is, how well it does, whose the weights are, how to load it."""

import dataclasses
from typing import Any

from res2net_jax.cost import cost, count_parameters
from res2net_jax.metadata import abstract_model
from res2net_jax.preprocess import known_setting
from res2net_jax.provenance import RELEASE_LICENSE, ancestor_of, release_of
from res2net_jax.variants import VARIANTS, Preprocessing

PAPER = "https://arxiv.org/abs/1904.01169"

_TEMPLATE = """\
# {title}

{what}

## Use it

```python
import res2net_jax

model = res2net_jax.load("{address}")
for prediction in res2net_jax.classify(model, "photo.jpg"):
    print(f"{{prediction.probability:.1%}} {{prediction.label}}")
```
{timm}
## Figures

{figures}

{accuracy}

## Is it what it says?

{certificate}

## Licence

{license}

## Citation

S.-H. Gao, M.-M. Cheng, K. Zhao, X.-Y. Zhang, M.-H. Yang, P. Torr, *Res2Net: A New Multi-scale Backbone Architecture*,
IEEE TPAMI 2021, {paper}
"""


def model_card(metadata: dict[str, Any], address: str, *, license: str | None = None, timm: bool = False) -> str:
    """The text of a model's ``README.md``, with the hub's metadata at its top.

    Args:
        metadata: Of its checkpoint.
        address: What :func:`res2net_jax.load` takes.
        license: Of the weights, as the hub names it, e.g. ``"apache-2.0"``; the released ones, and by default those
            that began as such, have theirs.
        timm: It is also there for timm.

    Raises:
        ValueError: A license for released weights.
    """
    from huggingface_hub import EvalResult, ModelCardData

    model = abstract_model(metadata).eval()
    release, ancestor = release_of(metadata), ancestor_of(metadata)
    if release and license:
        raise ValueError(
            f"these are the released weights of {release.name}, which keep their licence; leave license out"
        )
    dataset = "imagenet-1k" if release else metadata["source"].get("dataset")
    evaluation = _evaluation(metadata, release)
    data = {
        "library_name": "res2net_jax",
        "pipeline_tag": "image-classification" if model.num_classes else "image-feature-extraction",
        "tags": ["res2net", "jax", "flax", *(["timm"] if timm else [])],
        "license": license or ("other" if ancestor else None),
        "license_name": RELEASE_LICENSE if ancestor and not license else None,
        "license_link": "https://github.com/Res2Net/Res2Net-PretrainedModels" if ancestor and not license else None,
        "base_model": ancestor.hub_id if ancestor and not release else None,
        "datasets": ["imagenet-1k"] if release else None,
    }
    if evaluation:
        data["model_name"] = model.name
        data["eval_results"] = [
            EvalResult(
                task_type="image-classification",
                dataset_type=str(dataset),
                dataset_name="ImageNet-1k" if release else str(dataset),
                metric_type="accuracy",
                metric_name=name,
                metric_value=value,
            )
            for name, value in evaluation.items()
        ]
    text = _TEMPLATE.format(
        title=address.removeprefix("hf://").partition("@")[0].partition("/")[2],
        what=_what(model, metadata),
        address=address,
        timm=_TIMM.format(name=address.removeprefix("hf://").partition("@")[0]) if timm else "",
        figures=_figures(model),
        accuracy=_accuracy(evaluation, release, dataset),
        certificate=_certificate(metadata),
        license=_license(license, release, ancestor),
        paper=PAPER,
    )
    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n{text}"


_TIMM = """
The same weights for PyTorch: `timm.create_model("hf-hub:{name}", pretrained=True)`.
"""


def _what(model, metadata):
    source = metadata["source"]
    text = f"A {model.name}, one of the [Res2Net]({PAPER}) family, in JAX and Flax by res2net_jax: "
    text += f"{model.num_classes} classes" if model.num_classes else "pooled features, no classifier"
    text += f", {model.in_chans} channel{'s' * (model.in_chans > 1)} in."
    if source:
        text += "\n\n" + "\n".join(f"- {key}: {value}" for key, value in source.items() if key != "evaluation")
    return text


def _figures(model):
    size = (known_setting(model) or Preprocessing()).size
    price = cost(model, size, size)
    changed = [
        f"{field} = {value!r}"
        for field, value in dataclasses.asdict(model.arch).items()
        if model.name not in VARIANTS or value != getattr(VARIANTS[model.name].arch, field)
    ]
    lines = [
        "| | |",
        "|---|--:|",
        f"| parameters | {count_parameters(model):,} |",
        f"| multiply-adds | {price.macs:,} |",
        f"| images | {size}x{size} |",
    ]
    if changed:
        lines += ["", f"Architecture: {', '.join(changed)}."]
    return "\n".join(lines)


def _evaluation(metadata, release):
    """Accuracies in per cent: as published for a release, else as the trainer measured them."""
    if release:
        return {"top-1": release.imagenet.top1, "top-5": release.imagenet.top5}
    measured = metadata["source"].get("evaluation") or {}
    return {f"top-{k}": round(measured[f"top{k}"], 3) for k in (1, 5) if f"top{k}" in measured}


def _accuracy(evaluation, release, dataset):
    if not evaluation:
        return "Its accuracy has not been stated."
    origin = "as published by timm for these weights" if release else "as measured in training"
    lines = [f"Accuracy on {'ImageNet-1k' if release else dataset} in per cent, {origin}:", "", "| | |", "|---|--:|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in evaluation.items())])


def _certificate(metadata):
    certificate = metadata["certificate"]
    if not certificate["certified"]:
        return f"Not certified: {certificate['reason']}."
    lines = [
        f"Compared with {certificate['reference']}; the largest differences, relative to the largest value:",
        "",
    ]
    for dtype, sizes in certificate["error"].items():
        for size, stages in sizes.items():
            if len(lines) == 2:
                lines += [f"| | {' | '.join(stages)} |", "|---" * (len(stages) + 1) + "|"]
            lines.append(f"| {dtype} {size} | {' | '.join(f'{error:.0e}' for error in stages.values())} |")
    return "\n".join(lines)


def _license(license, release, ancestor):
    code = "The code of res2net_jax is Apache-2.0."
    if release:
        return (
            "The weights are those that the Res2Net authors released, for non-commercial use; these terms travel with "
            f"them. {code}"
        )
    stated = f"{license}, as stated by whoever shared the weights." if license else ""
    if ancestor:
        return (
            f"{stated} The weights began as those of {ancestor.name}, which the Res2Net authors released for "
            f"non-commercial use. {code}"
        ).strip()
    return stated or f"Whoever shared the weights has not stated one. {code}"
