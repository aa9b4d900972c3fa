"""The time line of a few tokens: what the processor did, when it stood still, and what was on its way meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foregate.drawing import DARK, INK, LIGHT, MIDDLE, picture
from foregate.report.layout import lanes
from foregate.report.prefetches import CANCELLED, DEMAND, LATE, PREFETCH
from foregate.report.read import RunReport
from foregate.report.timeline import EXPERTS, GATES, LOADS, PASSES, STALLS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch

LOOKS = {  # of loads: fill, hatch
    DEMAND: (INK, ""),
    PREFETCH: (MIDDLE, ""),
    LATE: (MIDDLE, "////"),
    CANCELLED: ("white", "xxxx"),
}
LABELS = {
    DEMAND: "demand load",
    PREFETCH: "prefetch",
    LATE: "prefetch, late: routed while under way",
    CANCELLED: "prefetch, cancelled",
}
WIDTH = 12.0  # inches
LEAST_LABEL, LEAST_LAYER_LABEL, LEAST_TOKEN_LABEL = 0.022, 0.012, 0.1  # of the width, that a label needs


def plot_timeline(report: RunReport, start: int, end: int, *paths: Path) -> None:
    """Draw the time from `start` to `end`, microseconds, of a report with a time line."""
    rows = report.timeline
    seen = {kind: _visible(rows[kind], start, end) for kind in (EXPERTS, GATES, STALLS, LOADS)}
    tracks = lanes(seen[LOADS])
    with picture((WIDTH, 2.2 + 0.27 * len(tracks)), *paths) as figure:
        axes = figure.subplots()
        _draw_processor(axes, seen, start, end)
        for lane, loads in enumerate(tracks):
            _draw_loads(axes, loads, start, end, y=-1.5 - lane)
        _mark_layers(axes, seen[EXPERTS], start, end)
        _mark_tokens(axes, rows[PASSES], start, end)
        middle = [-1.5 - (len(tracks) - 1) / 2] if tracks else []
        axes.set_yticks([0, *middle], ["processor", "loads\n(layer.expert)"][: 1 + len(middle)])
        axes.tick_params(axis="y", length=0)
        axes.set(xlim=(0, (end - start) / 1e3), ylim=(-1.2 - len(tracks), 1.4), xlabel="ms")
        axes.spines["left"].set_visible(False)
        figure.legend(handles=_legend(seen), loc="outside lower center", ncols=4, frameon=False, fontsize=8)


def _visible(rows: Sequence[dict[str, Any]], start: int, end: int) -> list[dict[str, Any]]:
    return [row for row in rows if row["start"] < end and row["start"] + row["duration"] > start]


def _draw_processor(axes: Axes, seen: dict[str, list[dict[str, Any]]], start: int, end: int) -> None:
    axes.broken_barh([(0, (end - start) / 1e3)], (-0.4, 0.8), facecolor=LIGHT, linewidth=0)
    _bars(axes, seen[STALLS], start, 0, facecolor="white", edgecolor="#555555", hatch="....", linewidth=0.5)
    _bars(axes, seen[EXPERTS], start, 0, facecolor=INK, linewidth=0)
    _bars(axes, seen[GATES], start, 0, facecolor=DARK, edgecolor="white", hatch="||||", linewidth=0)


def _draw_loads(axes: Axes, loads: Sequence[dict[str, Any]], start: int, end: int, y: float) -> None:
    for kind, (fill, hatch) in LOOKS.items():
        own = [load for load in loads if load["kind"] == kind]
        _bars(axes, own, start, y, facecolor=fill, hatch=hatch, edgecolor="#333333", linewidth=0.5)
    for load in loads:
        if load["duration"] >= LEAST_LABEL * (end - start):
            middle = (max(load["start"], start) + min(load["start"] + load["duration"], end)) / 2
            look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 6, "clip_on": True}
            if load["kind"] == DEMAND:
                look["color"] = "white"
            elif LOOKS[load["kind"]][1]:  # a plain ground to be read on
                look["bbox"] = {"boxstyle": "square,pad=0.15", "facecolor": "white", "linewidth": 0}
            axes.text((middle - start) / 1e3, y, f"{load['layer']}.{load['expert']}", **look)


def _bars(axes: Axes, rows: Sequence[dict[str, Any]], start: int, y: float, **look: Any) -> None:
    spans = [((row["start"] - start) / 1e3, row["duration"] / 1e3) for row in rows]
    axes.broken_barh(spans, (y - 0.4, 0.8), **look)


def _mark_tokens(axes: Axes, passes: Sequence[dict[str, Any]], start: int, end: int) -> None:
    inside = [row["start"] for row in passes if start <= row["start"] < end]
    for at, after in zip(inside, [*inside[1:], end], strict=True):
        axes.axvline((at - start) / 1e3, color="#888888", linewidth=0.8, zorder=0)
        if after - at >= LEAST_TOKEN_LABEL * (end - start):
            axes.text((at - start) / 1e3, 0.95, f" token: {(after - at) / 1e3:.1f} ms", fontsize=8, va="bottom")


def _mark_layers(axes: Axes, computed: Sequence[dict[str, Any]], start: int, end: int) -> None:
    """The number of a layer where its experts begin to be computed, if there is room."""
    layer, last = None, -float("inf")
    for row in computed:
        at = max(row["start"] - start, 0)
        if row["layer"] != layer and at - last >= LEAST_LAYER_LABEL * (end - start):
            label = f"layer {row['layer']}" if layer is None else row["layer"]
            axes.text(at / 1e3, 0.46, label, fontsize=6, va="bottom", color="#555555")
            last = at
        layer = row["layer"]


def _legend(seen: dict[str, list[dict[str, Any]]]) -> list[Patch]:
    """What is in the picture."""
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=INK, label="experts computed"), Patch(facecolor=LIGHT, label="the rest of the model")]
    if seen[GATES]:
        patches.append(Patch(facecolor=DARK, edgecolor="white", hatch="||||", linewidth=0, label="gates"))
    if seen[STALLS]:
        look = {"facecolor": "white", "edgecolor": "#555555", "hatch": "....", "linewidth": 0.5}
        patches.append(Patch(label="stall: waiting for a load", **look))
    for kind, (fill, hatch) in LOOKS.items():
        if any(load["kind"] == kind for load in seen[LOADS]):
            patches.append(Patch(facecolor=fill, hatch=hatch, edgecolor="#333333", linewidth=0.5, label=LABELS[kind]))
    return patches
