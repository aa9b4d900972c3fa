"""`foregate bench policies`, `paper` and `validate`: live comparisons of policies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from foregate.cli.generate import THREADS_HELP
from foregate.cli.simulate import ALL_POLICIES
from foregate.cli.units import parse_bandwidths, split_list
from foregate.config import BenchConfig, EngineConfig

if TYPE_CHECKING:
    from foregate.bench.policies import Bench

STORE = typer.Argument(..., metavar="STORE", help="Folder of a converted model with lookahead gates.")
MEMORY_HELP = "Budgets, as for generate, joined by commas."
LINKS = typer.Option(None, help="Speeds to pace the disk to, such as 250MB,1GB; by default it is as fast as it is.")
PROMPTS = typer.Option(
    None, metavar="FILE", help="UTF-8 text file with one prompt a line; by default three short ones."
)
TOKENS = typer.Option(BenchConfig.tokens, help="Tokens measured after each prompt.")
WARM_UP = typer.Option(BenchConfig.warm_up, help="Tokens after each prompt before them.")
REPEATS = typer.Option(BenchConfig.repeats, help="Repetitions; settings take turns within each.")
THREADS = typer.Option(EngineConfig.threads, help=THREADS_HELP)
BUFFERED = typer.Option(False, "--allow-buffered", help="Measure even where reads go through the page cache.")
JSON = typer.Option(None, metavar="OUT", help="Write every figure of every run into this file.")
PLOT = typer.Option(None, metavar="OUT", help="Draw a picture: a name ending with .png, .svg or .pdf.")


def policies(
    store: Path = STORE,
    policies: str = typer.Option(ALL_POLICIES, help="Policies, joined by commas."),
    memory: str = typer.Option(BenchConfig.memory, help=MEMORY_HELP),
    link_bandwidth: str = LINKS,
    prompts: Path = PROMPTS,
    tokens: int = TOKENS,
    warm_up: int = WARM_UP,
    repeats: int = REPEATS,
    threads: int = THREADS,
    allow_buffered: bool = BUFFERED,
    json: Path = JSON,
    plot: Path = PLOT,
) -> None:
    """Compare policies on this machine: decoding speed without the prompt, interleaved, with the bounds beside them."""
    from foregate.bench.policies import bench_policies

    _check_outputs(json, plot)
    bench = _bench(store, prompts, tokens, warm_up, threads, allow_buffered)
    cells = bench_policies(
        bench, split_list(policies, "--policies"), split_list(memory, "--memory"), _links(link_bandwidth), repeats
    )
    _finish(cells, _settings([bench], repeats), json, plot)


def paper(
    stores: list[Path] = typer.Argument(
        ..., metavar="STORE4 STORE3 STORE2", help="Stores of one model at 4, 3 and 2 bits, with lookahead gates."
    ),
    memory: str = typer.Option(BenchConfig.paper_memory, help=MEMORY_HELP),
    link_bandwidth: str = LINKS,
    prompts: Path = PROMPTS,
    tokens: int = TOKENS,
    warm_up: int = WARM_UP,
    repeats: int = REPEATS,
    threads: int = THREADS,
    allow_buffered: bool = BUFFERED,
    json: Path = JSON,
) -> None:
    """Repeat the paper's comparison: Mixtral-offloading, then its method one step at a time, at each bit width."""
    from foregate.bench.paper import bench_paper

    _check_outputs(json, None)
    benches = [_bench(store, prompts, tokens, warm_up, threads, allow_buffered) for store in stores]
    cells = bench_paper(benches, split_list(memory, "--memory"), _links(link_bandwidth), repeats)
    _finish(cells, _settings(benches, repeats), json, None)


def validate(
    store: Path = STORE,
    policies: str = typer.Option("lru,lookahead", help="Policies, joined by commas."),
    memory: str = typer.Option(BenchConfig.memory, help=MEMORY_HELP),
    link_bandwidth: str = LINKS,
    prompt: str = typer.Option("And the LORD said unto Moses,", help="Text to continue."),
    tokens: int = TOKENS,
    warm_up: int = WARM_UP,
    threads: int = THREADS,
    allow_buffered: bool = BUFFERED,
    json: Path = JSON,
) -> None:
    """Compare the simulator with the engine: the same calls, on the machine that was measured while they ran."""
    from foregate.bench.live import Script
    from foregate.bench.policies import Bench
    from foregate.bench.validate import validate as validated
    from foregate.cli.tables import print_validation
    from foregate.report import write_report

    _check_outputs(json, None)
    bench = Bench(store, Script((prompt,), tokens, warm_up), threads, allow_buffered, _announce)
    settings = split_list(policies, "--policies"), split_list(memory, "--memory"), _links(link_bandwidth)
    rows = list(validated(bench, *settings))
    print_validation(rows)
    _warn(row.live.foreign_load for row in rows)
    if json:
        write_report({**_settings([bench], 1), "rows": [row.to_json() for row in rows]}, json)


def _bench(store: Path, prompts: Path | None, tokens: int, warm_up: int, threads: int, allow_buffered: bool) -> Bench:
    from foregate import ForegateError
    from foregate.bench import live
    from foregate.bench.policies import Bench

    texts = live.PROMPTS
    if prompts is not None:
        try:
            texts = tuple(line for line in prompts.read_text("utf-8").splitlines() if line.strip())
        except UnicodeDecodeError:
            raise ForegateError(f"--prompts {prompts} is not UTF-8 text: convert it first") from None
    return Bench(store, live.Script(texts, tokens, warm_up), threads, allow_buffered, _announce)


def _links(text: str | None) -> list[float | None]:
    return list(parse_bandwidths(text, "--link-bandwidth")) if text else [None]


def _finish(cells: Any, settings: dict[str, Any], json: Path | None, plot: Path | None) -> None:
    from foregate.bench.plots import plot_speeds
    from foregate.cli.tables import print_live
    from foregate.report import write_report

    rows: list[dict[str, Any]] = []
    for cell in cells:
        print_live(cell)
        rows += cell
    _warn(row["foreign_load"] for row in rows)
    if json:
        write_report({**settings, "rows": rows}, json)
    if plot:
        plot_speeds(rows, plot)


def _settings(benches: list[Bench], repeats: int) -> dict[str, Any]:
    import os
    import platform

    first = benches[0]
    script = {"prompts": first.script.prompts, "tokens": first.script.tokens, "warm_up": first.script.warm_up}
    machine = {"platform": platform.platform(), "cpus": os.cpu_count(), "threads": first.threads}
    return {
        "stores": [bench.store.name for bench in benches],
        "script": script,
        "repeats": repeats,
        "machine": machine,
        "buffered": first.allow_buffered,
    }


def _check_outputs(json: Path | None, plot: Path | None) -> None:
    from foregate.drawing import check_plot
    from foregate.report import check_report_path

    if json:
        check_report_path(json)
    if plot:
        check_plot(plot)


def _announce(line: str) -> None:
    typer.echo(line, err=True)


def _warn(loads: Any) -> None:
    worst = max((load for load in loads if load is not None), default=0.0)
    if worst > BenchConfig.foreign_load:
        _announce(f"warning: other programs took up to {worst:.0%} of this machine: the timings are not to be trusted")
