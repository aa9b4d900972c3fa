"""Tokens/s over the budget, a panel for each link. Every curve has a marker and a line style of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foregate.drawing import check_plot, picture

STYLES = {
    "demand": ("#bbbbbb", "x", ":"),
    "lru": ("#777777", "s", "--"),
    "mixtral-offloading": ("#c77b30", "^", "--"),
    "mixtral-offloading-code": ("#d9a679", "v", ":"),
    "lookahead": ("#1d3557", "o", "-"),
    "clairvoyant-horizon": ("#2a9d8f", "D", "-."),
    "clairvoyant-determined": ("#7fb8ad", "<", "-."),
    "clairvoyant": ("#000000", "d", "-."),
}
OTHER_STYLES = (("#457b9d", "P", "--"), ("#8d6a9f", "<", "--"), ("#e76f51", ">", "-."))
COLUMNS = 4  # of panels
NARROWEST = 6.4  # inches, so that three names of policies fit beside each other


def plot_speeds(rows: Sequence[dict[str, Any]], path: Path, note: str = "") -> None:
    """rows: `policy` or `name`, `memory`, `link_bandwidth` (bytes/s or None) and `tokens_per_second`, a number or a
    spread with `median`, `least`, `most`. Raises ForegateError, OSError."""
    check_plot(path)
    links = list(dict.fromkeys(row["link_bandwidth"] for row in rows))
    columns = min(len(links), COLUMNS)
    lines = -(-len(links) // columns)
    with picture((max(3.2 * columns, NARROWEST), 3.0 * lines + 0.9), path) as figure:
        panels = figure.subplots(lines, columns, squeeze=False).flatten()
        for panel, link in zip(panels, links, strict=False):
            _draw(panel, [row for row in rows if row["link_bandwidth"] == link])
            panel.set_title(_title(link))
        for panel in panels[len(links) :]:
            panel.set_axis_off()
        panels[0].set_ylabel("tokens/s")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=3 if columns < 3 else 4, frameon=False, fontsize=8
        )
        if note:
            figure.suptitle(note, fontsize=6, wrap=True)


def _title(link: float | None) -> str:
    if link is None:
        return "the disk as it is"
    return f"{link / 1e9:g} GB/s" if link >= 1e8 else f"{link / 1e6:g} MB/s"


def _draw(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    budgets = list(dict.fromkeys(row["memory"] for row in rows))
    names = list(dict.fromkeys(_name(row) for row in rows))
    others = iter(OTHER_STYLES * len(names))
    for name in names:
        color, marker, line = STYLES.get(name) or next(others)
        own = [row for row in rows if _name(row) == name]
        spreads = [_spread(row["tokens_per_second"]) for row in own]
        below, middle, above = zip(*((m - low, m, high - m) for low, m, high in spreads), strict=True)
        places = [budgets.index(row["memory"]) for row in own]
        style = {"color": color, "marker": marker, "linestyle": line, "markersize": 4, "capsize": 2, "label": name}
        axes.errorbar(places, middle, yerr=(below, above), **style)
    axes.set_xticks(range(len(budgets)), budgets)
    axes.set_xlabel("experts in memory")
    axes.set_ylim(bottom=0)


def _name(row: dict[str, Any]) -> str:
    return row.get("policy") or row["name"]


def _spread(speed: float | dict[str, float]) -> tuple[float, float, float]:
    return (speed["least"], speed["median"], speed["most"]) if isinstance(speed, dict) else (speed, speed, speed)
