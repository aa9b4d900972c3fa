"""Tables and figures of what benchmarks/gate_ablation.py measured.

    python benchmarks/gate_report.py benchmarks/results/gate-ablation-{mixtral,qwen3}.json --figures docs/figures

Recalls are means over the measured sources for which the horizon lies in the same token, unless a source is named.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
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

Row = dict[str, Any]


class Result:
    """One model's results."""

    def __init__(self, path: Path) -> None:
        self.rows: dict[str, Any] = json.loads(path.read_text())
        self.name: str = self.rows["model"]["checkpoint"]
        self.width: int = self.rows["model"]["default_width"]
        self.layers = LAYERS[self.name]
        for row in self.rows["tokens"]:
            row["width"] = "default" if row["width"] == self.width else row["width"]

    def select(self, kind: str, **wanted: Any) -> list[Row]:
        return [row for row in self.rows[kind] if all(row[key] == value for key, value in wanted.items())]

    def recall(self, rows: Iterable[Row], horizon: int) -> float:
        """Mean over the sources for which that horizon (from 0) lies in the same token."""
        return mean(row["recall"][horizon] for row in rows if row["source"] + horizon + 1 < self.layers)

    def recalls(self, kind: str, **wanted: Any) -> str:
        """The recalls of all horizons for a table."""
        rows = self.select(kind, **wanted)
        return " / ".join(f"{self.recall(rows, horizon):.3f}" for horizon in range(HORIZONS)) if rows else "–"

    def values(self, kind: str, key: str) -> list[Any]:
        """All values of a key in order, once each."""
        return list(dict.fromkeys(row[key] for row in self.rows[kind]))


def line(*cells: Any) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |")


def head(title: str, *cells: str) -> None:
    print(f"\n{title}\n")
    line(*cells)
    line(*["---"] * len(cells))


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def print_forms(results: list[Result]) -> None:
    for result in results:
        head(
            f"Forms, {result.name}", "form", "learned", "multiply-adds (with attention)", "recall at horizons 1 / 2 / 3"
        )
        for form in result.values("form", "form"):
            row, cost = result.select("form", form=form)[0], ("–", "–")
            if "learned_share" in row:
                work, with_attention = row["multiplications_share"], row["multiplications_share_with_attention"]
                cost = (percent(row["learned_share"]), f"{percent(work)} ({percent(with_attention)})")
            line(form, *cost, result.recalls("form", form=form))


def print_by_model(results: list[Result], kind: str, *keys: str) -> None:
    """One line for each combination of the keys' values that both models have."""
    head(kind, *keys, *(result.name for result in results))
    for values in dict.fromkeys(tuple(row[key] for key in keys) for result in results for row in result.rows[kind]):
        wanted = dict(zip(keys, values, strict=True))
        line(*values, *(result.recalls(kind, **wanted) for result in results))


def print_horizons(results: list[Result]) -> None:
    head("horizon", "model", "source", "gate", *map(str, range(1, 7)))
    for result in results:
        for row in result.rows["horizon"]:
            recalls = [
                f"{value:.3f}" + "*" * after for value, (_, after) in zip(row["recall"], row["targets"], strict=True)
            ]
            source = "token" if row["source"] == result.layers else row["source"]
            line(result.name, source, row["gate"], *recalls)


def print_texts(results: list[Result]) -> None:
    for result in results:
        judged = result.values("texts", "judged_on")
        head(f"texts, {result.name}: mean of horizons 1 to 3", "trained on", *map(_kind_of_text, judged))
        for trained in result.values("texts", "trained_on"):
            cells = []
            for text in judged:
                rows = result.select("texts", trained_on=trained, judged_on=text)
                cells.append(f"{mean(result.recall(rows, horizon) for horizon in range(HORIZONS)):.3f}")
            line(trained, *cells)


def _kind_of_text(name: str) -> str:
    return name.removeprefix("heldout-").removesuffix(".txt")


def print_ceilings(results: list[Result]) -> None:
    """Of the untrained gate's miss, the share that is closed; and the way from the untrained gate to the ceiling."""
    head(
        "ceiling",
        *("model", "source", "horizon", "untrained", "default", "width 256", "ceiling", "ceiling, more inputs"),
        *("miss closed: default", "256", "ceiling", "more inputs", "way to the ceiling: default", "256"),
    )
    for result in results:
        for source in result.values("ceiling", "source"):
            rows = {row["gate"]: row["recall"] for row in result.select("ceiling", source=source)}
            rows["ceiling"] = best_of_any_size(result, source)
            more = next(gate for gate in rows if "more inputs" in gate)
            for horizon in range(HORIZONS):
                start, *found = (rows[g][horizon] for g in ("untrained", "default", "width 256", "ceiling", more))
                found[-1] = max(found[-2:])
                closed = [f"{(value - start) / (1 - start):.0%}" for value in found]
                way = [f"{(value - start) / (found[2] - start):.0%}" for value in found[:2]]
                line(result.name, source, horizon + 1, *(f"{v:.3f}" for v in (start, *found)), *closed, *way)


def best_of_any_size(result: Result, source: int) -> list[float]:
    """The best recall of any gate with the product's inputs, by horizon."""
    rows = [row for row in result.select("ceiling", source=source) if "more inputs" not in row["gate"]]
    return [max(values) for values in zip(*(row["recall"] for row in rows), strict=True)]


def draw_sizes(axes: Axes, result: Result) -> None:
    forms = result.values("form", "form")
    mlps = [form for form in forms if form.removeprefix("MLP ").isdigit()]
    ranks = [form for form in forms if form.startswith("linear, rank") and "no routers" not in form]
    best = [{"source": s, "recall": best_of_any_size(result, s)} for s in result.values("ceiling", "source")]

    def points(forms: list[str], horizon: int) -> tuple[list[float], list[float]]:
        rows = [result.select("form", form=form) for form in forms]
        return [100 * row[0]["learned_share"] for row in rows], [result.recall(row, horizon) for row in rows]

    for horizon in range(HORIZONS):
        first = str if not horizon else lambda label: None  # one entry in the legend for all horizons
        style = {"color": SHADES[horizon], "marker": MARKERS[horizon]}
        axes.plot(*points(mlps, horizon), label=f"MLP, horizon {horizon + 1}", **style)
        axes.plot(
            *points(ranks, horizon), linestyle="none", markerfacecolor="white", label=first("linear, low rank"), **style
        )
        untrained = result.recall(result.select("form", form="routers behind norms (untrained)"), horizon)
        axes.axhline(untrained, color=SHADES[horizon], linestyle="--", linewidth=0.9, label=first("untrained"))
        axes.axhline(
            result.recall(best, horizon),
            color=SHADES[horizon],
            linestyle=":",
            linewidth=1.2,
            label=first("best of any size"),
        )
    axes.axvline(5, color="0.8", linewidth=0.8, zorder=0)
    axes.set_xscale("log")
    axes.set_xticks(SHARES, [str(share) for share in SHARES])
    axes.minorticks_off()
    axes.set(title=result.name, xlabel="learned parameters, % of the backbone's", ylabel="recall@k, held-out text")


def draw_horizons(axes: Axes, result: Result, source: int, title: str) -> None:
    for gate, style in GATES.items():
        recall = result.select("horizon", source=source, gate=gate)[0]["recall"]
        axes.plot(range(1, len(recall) + 1), recall, label=gate, **style)
    axes.set(title=f"{result.name}: {title}", xlabel="horizon", ylim=(0, 1))


def draw(results: list[Result], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for one, result in zip(axes, results, strict=True):
        draw_sizes(one, result)
    axes[0].legend(fontsize=7, frameon=False, loc="lower right")
    figure.savefig(folder / "gate-size.png", dpi=120)

    figure, axes = pyplot.subplots(2, 3, figsize=(10.5, 6), layout="constrained", sharey=True)
    for row, result in zip(axes, results, strict=True):
        far = len(result.rows["horizon"][0]["recall"])
        inner = max(source for source in result.values("horizon", "source") if source + far < result.layers)
        draw_horizons(row[0], result, inner, f"from layer {inner} of {result.layers}")
        draw_horizons(row[1], result, result.layers - 1, "last layer, next token")
        draw_horizons(row[2], result, result.layers, "the sampled token")
        row[0].set_ylabel("recall@k, held-out text")
    axes[0, 1].legend(fontsize=8, frameon=False)
    figure.savefig(folder / "gate-horizon.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs=2)
    parser.add_argument("--figures", type=Path, required=True)
    args = parser.parse_args()
    results = [Result(path) for path in args.results]
    print_forms(results)
    print_by_model(results, "loss", "loss")
    print_by_model(results, "tokens", "width", "tokens")
    print_horizons(results)
    print_texts(results)
    print_by_model(results, "quantized", "bits", "gate")
    print_ceilings(results)
    draw(results, args.figures)


if __name__ == "__main__":
    main()
