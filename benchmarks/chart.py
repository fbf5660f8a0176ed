"""The results of inference as a picture: for every model and batch, how many times as fast we are as each peer."""

import dataclasses
from pathlib import Path

import matplotlib.pyplot as plt
import tyro

from benchmarks import results

COLORS = {
    "timm eager": "#9db7d1",
    "torch.compile": "#31688e",
    "torch.compile, frozen": "#7b6bb2",
    "zeromodels": "#e0a458",
    "ONNX Runtime": "#8f8f8f",
    "torch.compile, CUDA graphs": "#35b779",
}
FAR = "on cores that share no cache, where measured"


@dataclasses.dataclass(frozen=True)
class Options:
    """Draws RESULTS/inference-DEVICE.svg."""

    results: Path = results.FOLDER


def run(task: str, arguments: list[str]) -> None:
    options = tyro.cli(Options, prog="python -m benchmarks chart", args=arguments)
    rows = results.read("inference", options.results)
    file = options.results / f"inference-{results.kind()}.svg"
    draw(rows).savefig(file, facecolor="white")
    print(file)


def draw(rows: list[dict[str, str]]) -> plt.Figure:
    """One panel for each batch size, one group of bars for each model, one bar for each peer.

    Of turns on cores that are far from each other, a dot in place of the bar.
    """
    peers = [peer for peer in COLORS if f"{peer} / ours" in rows[0]]
    models = list(dict.fromkeys(row["model"] for row in rows))
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    figure, panels = plt.subplots(1, len(batches), figsize=(3.6 * len(batches) + 1.6, 1.1 + 0.72 * len(models)),
                                  sharex=True, sharey=True, layout="constrained", squeeze=False)  # fmt: skip
    height = 0.8 / len(peers)
    for panel, batch in zip(panels[0], batches):
        of_batch = [row for row in rows if row["batch"] == batch]
        far, ratios = (
            {row["model"]: row for row in of_batch if (row["cores"] == "far") == is_far} for is_far in (True, False)
        )
        for i, peer in enumerate(peers):
            values, values_far = (
                [float(where.get(model, {}).get(f"{peer} / ours") or "nan") for model in models]
                for where in (ratios, far)
            )
            places = [place + (i - (len(peers) - 1) / 2) * height for place in range(len(models))]
            panel.barh(places, values, height * 0.9, color=COLORS[peer], label=peer)
            behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # the line at 1 would cross them
            style = {"fontsize": 7, "color": "#444444", "bbox": behind, "va": "center_baseline"}
            for place, value, dot in zip(places, values, values_far):
                if value == value:
                    end = dot if value < dot + 0.02 < value + 0.3 else value  # not where the dot is
                    panel.annotate(f"{value:.2f}", (end, place), (4, 0), textcoords="offset points", **style)
            panel.scatter(values_far, places, s=7, color="black", zorder=3, label="" if i else FAR)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_title(f"batch {batch}", fontsize=10)
        panel.set_yticks(range(len(models)), models)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
        panel.margins(x=0.12)
    panels[0][0].invert_yaxis()
    figure.suptitle("Time of a peer's forward pass / time of ours (right of the line we are the faster)", fontsize=10)
    handles = dict(zip(*reversed(panels[0][0].get_legend_handles_labels())))
    if not any(row["cores"] == "far" for row in rows):
        del handles[FAR]
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure
