"""Several reports beside each other: four figures, a bar for each run, the value written at its end."""

from collections.abc import Callable, Sequence
from pathlib import Path

from foregate.drawing import INK, LIGHT, MIDDLE, picture
from foregate.report.read import RunReport

MIB = 2**20
FIGURES: dict[str, tuple[Callable[[RunReport], float], str]] = {
    "tokens/s": (lambda run: run.tokens_per_second or 0.0, "{:.1f}"),
    "hit rate, %": (lambda run: 100 * run.hit_rate, "{:.1f}"),
    "stall, % of the time": (lambda run: 100 * run.stall_share, "{:.1f}"),
    "MiB read per token": (lambda run: run.bytes_per_token / MIB, "{:.2f}"),
}
LOOKS = ((INK, ""), (MIDDLE, ""), (LIGHT, "////"), ("white", "xxxx"), ("white", "...."))


def plot_comparison(reports: Sequence[RunReport], *paths: Path) -> None:
    """Tokens/s, hit rate, share of stalls and bytes per token of each run."""
    with picture((11.0, 1.3 + 0.32 * len(reports)), *paths) as figure:
        panels = figure.subplots(1, len(FIGURES), sharey=True)
        for axes, (title, (value_of, form)) in zip(panels, FIGURES.items(), strict=True):
            for place, report in enumerate(reports):
                value, (fill, hatch) = value_of(report), LOOKS[place % len(LOOKS)]
                axes.barh(place, value, color=fill, hatch=hatch, edgecolor="#333333", linewidth=0.6, height=0.7)
                axes.text(value, place, " " + form.format(value), va="center", fontsize=8)
            axes.set_title(title)
            axes.margins(x=0.25)
            axes.tick_params(axis="y", length=0)
        labels = [f"{report.name}\n{report.policy}, {report.memory}" for report in reports]
        panels[0].set_yticks(range(len(reports)), labels, fontsize=8)
        panels[0].invert_yaxis()
