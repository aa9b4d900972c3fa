"""What went over the link for each layer, and what it was good for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from foregate.drawing import INK, LIGHT, MIDDLE, picture
from foregate.report.read import RunReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIB = 2**20
LOOKS = {  # fill, hatch
    "demand": (INK, ""),
    "prefetched, useful": (MIDDLE, ""),
    "prefetched, late": (MIDDLE, "////"),
    "prefetched, wasted": ("white", "xxxx"),
    "prefetched, not used yet": (LIGHT, "...."),
}


def traffic(report: RunReport) -> dict[str, list[int]]:
    """Bytes by what they were good for, for each layer; together they are all bytes read."""
    demand = [own.bytes_read - ahead.bytes_moved for own, ahead in zip(report.layers, report.prefetches, strict=True)]
    parts = ("useful_bytes", "late_bytes", "wasted_bytes", "unused_bytes")
    columns = [demand, *([getattr(counts, part) for counts in report.prefetches] for part in parts)]
    return dict(zip(LOOKS, columns, strict=True))


def plot_traffic(report: RunReport, *paths: Path) -> None:
    """Two panels: the whole run, a bar for each kind of bytes, and each layer's, stacked."""
    parts = {name: values for name, values in traffic(report).items() if any(values)}
    with picture((11.0, 3.4), *paths) as figure:
        whole, by_layer = figure.subplots(1, 2, width_ratios=(1, 1.5))
        _whole(whole, parts)
        _by_layer(by_layer, parts, len(report.layers))


def _whole(axes: Axes, parts: dict[str, list[int]]) -> None:
    everything = max(sum(map(sum, parts.values())), 1)
    for place, (name, values) in enumerate(parts.items()):
        fill, hatch = LOOKS[name]
        nbytes = sum(values)
        axes.barh(place, nbytes / MIB, color=fill, hatch=hatch, edgecolor="#333333", linewidth=0.6)
        text = f" {nbytes / MIB:,.1f} MiB, {nbytes / everything:.0%}"
        axes.text(nbytes / MIB, place, text, va="center", fontsize=8)
    axes.set_yticks(range(len(parts)), list(parts))
    axes.invert_yaxis()
    axes.margins(x=0.35)
    axes.set(title="Bytes read", xlabel="MiB")


def _by_layer(axes: Axes, parts: dict[str, list[int]], layers: int) -> None:
    below = [0.0] * layers
    for name, values in parts.items():
        fill, hatch = LOOKS[name]
        heights = [value / MIB for value in values]
        axes.bar(
            range(layers),
            heights,
            bottom=below,
            color=fill,
            hatch=hatch,
            edgecolor="#333333",
            linewidth=0.6,
            label=name,
        )
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set_xticks(range(0, layers, -(-layers // 12)))
    axes.set(title="Bytes read by layer", xlabel="MoE layer", ylabel="MiB")
    axes.margins(y=0.05)
