"""Tables of policies beside each other."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from foregate.cli.units import format_bandwidth

MIB = 2**20
WIDEST = 200  # columns of a terminal
SHORT = {
    "lru": "lru",
    "mixtral-offloading": "m-o",
    "mixtral-offloading-code": "m-o code",
    "clairvoyant": "clairv.",
    "clairvoyant-horizon": "horizon",
    "clairvoyant-determined": "determ.",
}
RATIOS_NOTE = "×: tokens/s over that policy's; m-o is mixtral-offloading"


def print_simulated(cell: Sequence[Any]) -> None:
    """cell: `simulate.cells.Result`s of one budget and link."""
    first = cell[0]
    references = list(first.ratios)
    title = f"{first.memory} of the experts ({first.slots} slots), {format_bandwidth(first.link_bandwidth)}"
    columns = ["tokens/s", "hits", "loads", "started", "in time", "late", "wasted", "stall", "link"]
    table = _table(title, [*columns, *(f"×{SHORT[name]}" for name in references)])
    table.caption = f"loads: a token; started to wasted: prefetches; stall, link: share of the time; {RATIOS_NOTE}"
    for result in cell:
        fetched = result.prefetches
        table.add_row(
            result.policy,
            f"{result.tokens_per_second:.2f}",
            _share(result.hit_rate),
            f"{result.loads_per_token:.1f}",
            *(f"{count:,}" for count in (fetched.started, fetched.in_time, fetched.late, fetched.wasted)),
            _share(result.stall_share),
            _share(result.link_share),
            *(_ratio(result.ratios[name]) for name in references),
        )
    _print(table)


def print_live(cell: Sequence[dict[str, Any]]) -> None:
    """cell: rows of `bench.compare.summarise` of one budget and link."""
    first = cell[0]
    references = list(first["ratios"])
    store = f"{first['store']}, " if "store" in first else ""
    title = f"{store}--memory {first['memory']}, {format_bandwidth(first['link_bandwidth'])}"
    columns = ["tokens/s", "spread", "hits", "precision", "MiB/token", "stall", "link", "bound by"]
    table = _table(title, [*columns, *(f"×{SHORT[name]}" for name in references)])
    table.caption = f"stall, link: share of decode time; medians; {RATIOS_NOTE}, in the same repetition"
    for row in cell:
        speed = row["tokens_per_second"]
        table.add_row(
            row["name"],
            f"{speed['median']:.2f}",
            f"{speed['least']:.2f}–{speed['most']:.2f}",
            _share(row["hit_rate"]),
            _share(row["prefetch_precision"]),
            f"{row['bytes_per_token'] / MIB:.1f}",
            _share(row["stall_share"]),
            _share(row["link_share"]),
            "link" if row["link_share"] > 1 - row["stall_share"] else "cpu",
            *(_ratio(row["ratios"][name]) for name in references),
        )
    if first.get("published_gain"):
        table.caption += f"; published for the whole method at {first['bits']} bits: ×{1 + first['published_gain']:.2f}"
    _print(table)


def print_validation(rows: Sequence[Any]) -> None:
    """rows: `bench.validate.Validation`s."""
    columns = ["link", "memory", "live", "simulated", "ratio", "stall", "simulated", "misses", "simulated"]
    table = _table("tokens/s of the engine and of the simulator", columns)
    for row in rows:
        live, simulated = row.live.counts, row.simulated
        table.add_row(
            row.setting.policy,
            format_bandwidth(row.setting.link_bandwidth),
            row.setting.memory,
            f"{row.live.tokens_per_second:.2f}",
            f"{simulated.tokens_per_second:.2f}",
            f"{row.ratio:.3f}",
            _share(live.stall_seconds / live.seconds),
            _share(simulated.stall_share),
            f"{live.misses:,}",
            f"{simulated.misses:,}",
        )
    _print(table)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left", caption_justify="left")
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _print(table: Table) -> None:
    """As wide as it needs to be: a cut figure is of no use."""
    console = Console()
    console.width = max(console.width, Console(width=WIDEST).measure(table).maximum)
    console.print(table)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _ratio(value: float) -> str:
    return f"{value:.3f}"
