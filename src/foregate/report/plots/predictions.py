"""What was found in memory and what had been foreseen: by layer, and by how far ahead."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from foregate.drawing import DARK, INK, LIGHT, MIDDLE, RULE, picture
from foregate.report.foresight import LAYER, Aim, Score, by_horizon
from foregate.report.read import RunReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS, MARKERS, LINES = (INK, DARK, "#c77b30", "#2a9d8f"), "os^D<>ph", ("-", "--", "-.", ":")


def plot_predictions(report: RunReport, *paths: Path) -> None:
    """Hit rate by layer; where there were predictions, recall@k by layer and, with precision, by horizon."""
    width = 12.0 if report.scores else 4.5
    with picture((width, 3.6), *paths) as figure:
        panels = figure.subplots(1, 3 if report.scores else 1, squeeze=False)[0]
        _hit_rate(panels[0], report)
        if report.scores:
            _recall(panels[1], report.scores)
            _by_horizon(panels[2], by_horizon(report.scores))


def _hit_rate(axes: Axes, report: RunReport) -> None:
    routed = [max(layer.hits + layer.misses, 1) for layer in report.layers]
    rates = [layer.hits / count for layer, count in zip(report.layers, routed, strict=True)]
    axes.bar(range(len(rates)), rates, color=MIDDLE, edgecolor=INK, linewidth=0.6)
    axes.axhline(report.hit_rate, color="black", linewidth=0.9, linestyle="--")
    title = f"Hit rate by layer (dashed: all, {report.hit_rate:.1%})"
    axes.set(title=title, xlabel="MoE layer", ylabel="experts resident when routed", ylim=(0, 1.03))
    _whole_numbers(axes, len(rates))


def _recall(axes: Axes, scores: dict[Aim, Score]) -> None:
    layers = max(aim.layer for aim in scores) + 1
    kinds = sorted({(aim.source, aim.horizon) for aim in scores if aim.source == LAYER})
    for number, (source, horizon) in enumerate(kinds):
        points = {aim.layer: score.recall for aim, score in scores.items() if aim[1:] == (source, horizon)}
        look = {"color": COLOURS[number % 4], "linestyle": LINES[number % 4], "marker": MARKERS[number % 8]}
        axes.plot(list(points), list(points.values()), markersize=4, label=f"{horizon} ahead", **look)
    points = {aim.layer: score.recall for aim, score in scores.items() if aim.source != LAYER}
    if points:
        look = {"marker": "*", "markersize": 9, "color": "black", "markerfacecolor": "white", "linestyle": ""}
        axes.plot(list(points), list(points.values()), label="from the token", **look)
    axes.set(title="Recall@k by layer", xlabel="MoE layer predicted", ylim=(0, 1.03))
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    _whole_numbers(axes, layers)


def _by_horizon(axes: Axes, scores: dict[tuple[str, int], Score]) -> None:
    names = [f"{horizon}" if source == LAYER else f"token\n{horizon}" for source, horizon in scores]
    _bars(axes, [score.recall for score in scores.values()], -0.2, label="recall@k", color=MIDDLE, hatch="")
    _bars(axes, [score.precision for score in scores.values()], 0.2, label="precision", color=LIGHT, hatch="///")
    axes.set_xticks(range(len(names)), names)
    axes.set(
        title="Recall and precision by horizon", xlabel="layers ahead (token: from the one just sampled)", ylim=(0, 1.2)
    )
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.legend(fontsize=8, frameon=False, loc="upper right", ncols=2)


def _bars(axes: Axes, values: Sequence[float | None], shift: float, **look: str) -> None:
    places = [place + shift for place in range(len(values))]
    heights = [value or 0.0 for value in values]
    axes.bar(places, heights, width=0.4, edgecolor=INK, linewidth=0.6, **look)
    for place, value in zip(places, values, strict=True):
        text = "-" if value is None else f"{100 * value:.0f}"
        axes.text(place, (value or 0) + 0.01, text, ha="center", va="bottom", fontsize=7)


def _whole_numbers(axes: Axes, layers: int) -> None:
    axes.set_xticks(range(0, layers, -(-layers // 12)))
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
