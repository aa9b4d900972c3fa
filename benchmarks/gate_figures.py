"""Draws what benchmarks/gate_ablation.py measured: recall by learned parameters, and by horizon.

python benchmarks/gate_figures.py benchmarks/results/gate-ablation-{mixtral,qwen3}.json --out docs/figures
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

HORIZONS = 3
SHARES = (2, 5, 10, 20, 50)  # ticks, %
SHADES = ("black", "0.4", "0.65")
MARKERS = ("o", "s", "^")
LAYERS = {"mixtral-tiny": 12, "qwen3-moe-tiny": 8}
GATES = {
    "trained": {"color": "black", "linestyle": "-", "marker": "o"},
    "untrained": {"color": "0.35", "linestyle": "--", "marker": "s"},
    "previous token": {"color": "0.6", "linestyle": "-.", "marker": "^"},
    "frequency": {"color": "0.7", "linestyle": ":", "marker": "x"},
}


def mean_recall(rows: list[dict[str, Any]], horizon: int, layers: int) -> float:
    """Over the sources for which that horizon (from 0) lies in the same token."""
    found = [row["recall"][horizon] for row in rows if row["source"] + horizon + 1 < layers]
    return sum(found) / len(found)


def best_of_any_size(result: dict[str, Any]) -> list[dict[str, Any]]:
    """For each source of the forms the best recall of any gate with the product's inputs."""
    best = []
    for source in {row["source"] for row in result["form"]}:
        rows = [row for row in result["ceiling"] if row["source"] == source and "more inputs" not in row["gate"]]
        recall = [max(values) for values in zip(*(row["recall"] for row in rows), strict=True)]
        best.append({"source": source, "recall": recall})
    return best


def draw_sizes(axes: Axes, result: dict[str, Any]) -> None:
    name = result["model"]["checkpoint"]
    layers = LAYERS[name]

    def mean(kind: str, gate: str, horizon: int) -> float:
        rows = [row for row in result[kind] if row["form" if kind == "form" else "gate"] == gate]
        return mean_recall(rows, horizon, layers)

    mlps = {row["form"]: row["learned_share"] for row in result["form"] if row["form"].removeprefix("MLP ").isdigit()}
    ranks = {row["form"]: row["learned_share"] for row in result["form"] if row["form"].startswith("linear, rank")}
    ranks = {form: share for form, share in ranks.items() if "no routers" not in form}
    for horizon in range(HORIZONS):
        style = {"color": SHADES[horizon], "marker": MARKERS[horizon]}
        shares = [100 * share for share in mlps.values()]
        axes.plot(shares, [mean("form", form, horizon) for form in mlps], label=f"MLP, horizon {horizon + 1}", **style)
        shares = [100 * share for share in ranks.values()]
        values = [mean("form", form, horizon) for form in ranks]
        label = "linear, low rank" if not horizon else None
        axes.plot(shares, values, linestyle="none", markerfacecolor="white", label=label, **style)
        untrained = mean("form", "routers behind norms (untrained)", horizon)
        label = "untrained" if not horizon else None
        axes.axhline(untrained, color=SHADES[horizon], linestyle="--", linewidth=0.9, label=label)
        label = "best of any size" if not horizon else None
        best = mean_recall(best_of_any_size(result), horizon, layers)
        axes.axhline(best, color=SHADES[horizon], linestyle=":", linewidth=1.2, label=label)
    axes.axvline(5, color="0.8", linewidth=0.8, zorder=0)
    axes.set_xscale("log")
    axes.set_xticks(SHARES, [str(share) for share in SHARES])
    axes.minorticks_off()
    axes.set(title=name, xlabel="learned parameters, % of the backbone's", ylabel="recall@k, held-out text")


def draw_horizons(axes: Axes, result: dict[str, Any], source: int, title: str) -> None:
    rows = [row for row in result["horizon"] if row["source"] == source]
    for gate, style in GATES.items():
        recall = next(row["recall"] for row in rows if row["gate"] == gate)
        axes.plot(range(1, len(recall) + 1), recall, label=gate, **style)
    axes.set(title=f"{result['model']['checkpoint']}: {title}", xlabel="horizon", ylim=(0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    results = [json.loads(path.read_text()) for path in args.results]
    args.out.mkdir(parents=True, exist_ok=True)
    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for one, result in zip(axes, results, strict=True):
        draw_sizes(one, result)
    axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(args.out / "gate-size.png", dpi=120)

    figure, axes = pyplot.subplots(2, 3, figsize=(10, 6), layout="constrained", sharey=True)
    for line, result in zip(axes, results, strict=True):
        layers = LAYERS[result["model"]["checkpoint"]]
        inner = max(row["source"] for row in result["horizon"] if row["source"] + len(row["recall"]) < layers)
        draw_horizons(line[0], result, inner, f"from layer {inner} of {layers}")
        draw_horizons(line[1], result, layers - 1, "last layer, next token")
        draw_horizons(line[2], result, layers, "from the sampled token")
        line[0].set_ylabel("recall@k, held-out text")
    axes[0, 1].legend(fontsize=8, frameon=False)
    figure.savefig(args.out / "gate-horizon.png", dpi=120)


if __name__ == "__main__":
    main()
