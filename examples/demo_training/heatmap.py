"""The figure of expert usage by layer for each kind of text."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Colours end at this multiple of an equal share; few cells lie above.
TOP = 4.0


def draw(title: str, experts_json: Path, png: Path) -> None:
    """Draw ``experts_json``, as the evaluation writes it, to ``png``."""
    data = json.loads(experts_json.read_text(encoding="utf-8"))
    shares = {kind: np.array(rows) for kind, rows in data["share_by_kind"].items()}
    layers, experts = next(iter(shares.values())).shape
    columns = 4 if experts <= 16 else 2
    rows = -(-(len(shares) + 1) // columns)
    width, height = (3.1, 3.6) if columns == 4 else (6.4, 2.3)
    figure, axes = plt.subplots(rows, columns, figsize=(columns * width, rows * height + 0.6), layout="constrained")
    panels = list(axes.flat)
    for axis, (kind, share) in zip(panels, shares.items(), strict=False):
        draw_kind(axis, kind, share * experts)
    draw_information(panels[len(shares)], data["mutual_information_bits"])
    add_colours(figure, panels[: len(shares)], experts)
    figure.suptitle(f"{title}: where held-out tokens go, {layers} layers of {experts} experts")
    figure.savefig(png, dpi=110)
    plt.close(figure)


def draw_kind(axis: Axes, kind: str, multiples: np.ndarray) -> None:
    """One panel: multiples of an equal share, by layer (down) and expert (across)."""
    axis.imshow(multiples, cmap="magma_r", vmin=0, vmax=TOP, aspect="auto", interpolation="nearest")
    layers, experts = multiples.shape
    axis.set_title(kind, fontsize=11)
    axis.set_xticks(range(0, experts, 1 if experts <= 16 else 4))
    axis.set_yticks(range(layers))
    axis.tick_params(labelsize=8)
    axis.set_xlabel("expert", fontsize=9)
    axis.set_ylabel("layer", fontsize=9)


def draw_information(axis: Axes, bits: list[float]) -> None:
    """The last panel: mutual information of kind and expert by layer."""
    axis.barh(range(len(bits)), bits, color="#5b2a86")
    axis.invert_yaxis()
    axis.set_yticks(range(len(bits)))
    axis.tick_params(labelsize=8)
    axis.set_title("kind of text and expert", fontsize=11)
    axis.set_xlabel("mutual information (bits)", fontsize=9)
    axis.set_ylabel("layer", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)


def add_colours(figure: Figure, panels: list[Axes], experts: int) -> None:
    """The colour scale shared by all panels."""
    bar = figure.colorbar(panels[0].images[0], ax=panels, extend="max", shrink=0.7, pad=0.01)
    bar.set_label(f"share of the layer's choices, in multiples of an equal share (1/{experts})", fontsize=9)
    bar.ax.tick_params(labelsize=8)
