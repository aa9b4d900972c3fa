"""Which experts the routers chose how often, and how often one had to be fetched: layers by experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from foregate.drawing import picture
from foregate.report.read import RunReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WRITTEN = 20  # experts of a layer, up to which counts are written into the squares
DARKNESS = 0.75  # of the map, from the lightest grey on: black squares would hide their numbers


def plot_routing(report: RunReport, *paths: Path) -> None:
    """Two heat maps: calls of its layer that chose an expert; the share of them that missed it."""
    chosen, missed = _grid(report.chosen), _grid(report.missed)
    shares = np.divide(100 * missed, chosen, out=np.full(chosen.shape, np.nan), where=chosen > 0)
    layers, experts = chosen.shape
    size = (11.0, min(max(1.4 + 0.24 * layers, 3.0), 9.0))
    with picture(size, *paths) as figure:
        left, right = figure.subplots(1, 2)
        _heat(figure, left, chosen, "Chosen, calls of the layer")
        _heat(figure, right, shares, "Missed, % of the times chosen", most=100)
        for axes in (left, right):
            axes.set(xlabel="expert", ylabel="MoE layer")
            axes.set_yticks(range(0, layers, -(-layers // 12)))
            axes.set_xticks(range(0, experts, -(-experts // 16)))


def _grid(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """float [layers, experts]; NaN where a layer has fewer experts than the widest."""
    grid = np.full((len(rows), max(map(len, rows))), np.nan)
    for row, values in zip(grid, rows, strict=True):
        row[: len(values)] = values
    return grid


def _heat(figure: Figure, axes: Axes, grid: np.ndarray, title: str, most: float | None = None) -> None:
    most = most or max(float(np.nanmax(grid)), 1.0)
    image = axes.imshow(grid, cmap="Greys", vmin=0, vmax=most / DARKNESS, aspect="auto", interpolation="nearest")
    axes.set_title(title)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if grid.shape[1] > WRITTEN:
        bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, boundaries=np.linspace(0, most, 33))
        bar.set_ticks(np.linspace(0, most, 5).round().tolist())
        return
    for (layer, expert), value in np.ndenumerate(grid):
        if not np.isnan(value):
            color = "white" if value > 0.7 * most else "black"
            axes.text(expert, layer, f"{value:.0f}", ha="center", va="center", fontsize=7, color=color)
