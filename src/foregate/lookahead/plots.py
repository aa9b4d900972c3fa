"""A picture of how gates do. Every curve has a marker and a line style of its own: it reads the same without colour."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from foregate.drawing import check_plot, picture
from foregate.lookahead.evaluation import GateEvaluation
from foregate.lookahead.scores import CEILING, FREQUENCY, GATE, METHODS, NEXT_ROUTER, PREVIOUS, UNTRAINED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {
    FREQUENCY: "frequency",
    PREVIOUS: "previous token",
    NEXT_ROUTER: "next router",
    UNTRAINED: "untrained gate",
    GATE: "gate",
    CEILING: "probe of the true input",
}
COLOURS = dict(zip(METHODS, ("#999999", "#777777", "#c77b30", "#2a9d8f", "#1d3557", "#000000"), strict=True))
MARKERS = dict(zip(METHODS, ("x", "+", "^", "s", "o", "d"), strict=True))
LINES = dict(zip(METHODS, (":", "-.", "--", "--", "-", ":"), strict=True))
KINDS = ("in token", "next token", "from token")


def plot_evaluation(evaluation: GateEvaluation, path: Path) -> None:
    """Draw recall by horizon, recall by source and calibration into one PNG, SVG or PDF. Raises ForegateError, OSError."""
    check_plot(path)
    with picture((14, 4.6), path) as figure:
        by_horizon, by_source, calibration = figure.subplots(1, 3, width_ratios=(1.25, 1.25, 1))
        _by_horizon(by_horizon, evaluation)
        _by_source(by_source, evaluation)
        _calibration(calibration, evaluation)


def _style(method: str) -> dict[str, object]:
    style = {"color": COLOURS[method], "marker": MARKERS[method], "linestyle": LINES[method], "markersize": 5}
    if method == NEXT_ROUTER:  # often the same figures as the untrained gate's: seen around its marker
        style |= {"markersize": 9, "markerfacecolor": "none"}
    return style


def _by_horizon(axes: Axes, evaluation: GateEvaluation) -> None:
    """Lines break between the kinds of target: they are different things to foresee."""
    places = {(group.kind, group.horizon): place for place, group in enumerate(evaluation.groups)}
    for method in METHODS:
        label: str | None = LABELS[method]
        for kind in KINDS:
            points = [
                (places[kind, group.horizon], group.scores[method].recall[0])
                for group in evaluation.groups
                if group.kind == kind and method in group.scores
            ]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, **_style(method))
                label = None
    axes.set_xticks(list(places.values()), [str(horizon) for _, horizon in places])
    for kind in KINDS:
        own = [place for (name, _), place in places.items() if name == kind]
        if own:
            axes.text((own[0] + own[-1]) / 2, -0.13, kind, transform=axes.get_xaxis_transform(), ha="center")
            axes.axvline(own[-1] + 0.5, color="#dddddd", linewidth=0.8)
    axes.set(title="Recall by horizon", ylabel=_recall_label(evaluation), ylim=(0, 1.03))
    axes.set_xlabel("MoE layers ahead", labelpad=18)
    axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.08), ncols=3)


def _by_source(axes: Axes, evaluation: GateEvaluation) -> None:
    """Filled markers: the target lies in the same token; hollow ones: beyond the token boundary."""
    names = list(dict.fromkeys(cell.source for cell in evaluation.cells))
    best = GATE if evaluation.gates else UNTRAINED
    curves = [(best, horizon) for horizon in range(1, evaluation.horizon + 1)]
    curves += [(UNTRAINED, 1)] * (best == GATE) + [(PREVIOUS, 1)]
    shapes = "osv^D<>ph*"
    for method, horizon in curves:
        cells = [c for c in evaluation.cells if c.horizon == horizon and method in c.scores]
        if not cells:
            continue
        style = _style(method)
        if method == best:
            style |= {"marker": shapes[(horizon - 1) % len(shapes)], "alpha": max(0.35, 1 - 0.25 * (horizon - 1))}
        x, y = [names.index(c.source) for c in cells], [c.scores[method].recall[0] for c in cells]
        layers = slice(None, -1 if cells[-1].source == names[-1] else None)
        axes.plot(x[layers], y[layers], **{**style, "marker": ""})
        for hollow in (False, True):
            at = [place for place, cell in enumerate(cells) if cell.next_token == hollow]
            own = {**style, "linestyle": ""} | ({"markerfacecolor": "white"} if hollow else {})
            axes.plot([x[place] for place in at], [y[place] for place in at], **own)
        axes.plot([], [], label=f"{LABELS[method]}, {horizon} ahead", **style)
    step = -(-len(names) // 14)
    shown = sorted({*range(0, len(names) - 1, step), len(names) - 1})
    axes.set_xticks(shown, ["token" if place == len(names) - 1 else str(place) for place in shown])
    axes.set(
        title="Recall by source",
        xlabel="source: MoE layer, or the sampled token (hollow: target in the next token)",
        ylim=(0, 1.03),
    )
    axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.08), ncols=2)


def _calibration(axes: Axes, evaluation: GateEvaluation) -> None:
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=0.8)
    for method, score in evaluation.overall.items():
        if score.calibration:
            points = [(bin.expected, bin.observed) for bin in score.calibration]
            label = f"{LABELS[method]}, error {score.calibration_error:.3f}"
            axes.plot(*zip(*points, strict=True), label=label, **_style(method))
    axes.set(
        title="Calibration", xlabel="probability given", ylabel="share used", xlim=(0, 1), ylim=(0, 1), aspect="equal"
    )
    axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.08))


def _recall_label(evaluation: GateEvaluation) -> str:
    k = set(evaluation.top_k)
    return f"recall@{k.pop()}" if len(k) == 1 else "recall@k"
