"""`foregate bench policies`, `paper` and `validate`: live comparisons of policies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foregate.cli import completion, options
from foregate.cli.simulate import ALL_POLICIES
from foregate.cli.units import parse_bandwidths, split_list
from foregate.config import BenchConfig, EngineConfig

if TYPE_CHECKING:
    from foregate.bench.live import Place
    from foregate.bench.policies import Bench

Memory = Annotated[str, typer.Option(metavar="SIZES", help="Budgets, as for generate, joined by commas.")]
Policies = Annotated[
    str,
    typer.Option(
        metavar="NAMES",
        help="Policies, joined by commas; with a device also lookahead+host: missed experts may be computed on the host.",
    ),
]
Links = Annotated[
    str | None,
    typer.Option(
        metavar="SPEEDS",
        help="Speeds to pace the disk to, such as 250MB,1GB; by default it is as fast as it is.",
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="UTF-8 text file with one prompt a line; by default three short ones."),
]
Tokens = Annotated[int, typer.Option(metavar="N", help="Tokens measured after each prompt.")]
WarmUp = Annotated[int, typer.Option(metavar="N", help="Tokens after each prompt before them.")]
Repeats = Annotated[int, typer.Option(metavar="N", help="Repetitions; settings take turns within each.")]
Buffered = Annotated[bool, typer.Option("--allow-buffered", help="Measure even where reads go through the page cache.")]


def policies(
    model: options.Model,
    policies: Policies = ALL_POLICIES,
    memory: Memory = BenchConfig.memory,
    link_bandwidth: Links = None,
    prompts: Prompts = None,
    tokens: Tokens = BenchConfig.tokens,
    warm_up: WarmUp = BenchConfig.warm_up,
    repeats: Repeats = BenchConfig.repeats,
    threads: options.Threads = EngineConfig.threads,
    device: options.Device = EngineConfig.device,
    host_memory: options.HostMemory = EngineConfig.host_memory,
    allow_buffered: Buffered = False,
    report: options.Report = None,
    plot: options.Plot = None,
    as_json: options.Json = False,
    bits: options.Bits = None,
    yes: options.Yes = False,
) -> None:
    """Compare policies on this machine: decoding speed without the prompt, interleaved, with the bounds beside them."""
    from foregate.bench.live import Place
    from foregate.bench.plots import plot_speeds
    from foregate.bench.policies import bench_policies
    from foregate.cli.models import open_model

    _check_outputs(report, plot)
    place = Place(device, host_memory, threads)
    bench = _bench(open_model(model, bits, yes), prompts, tokens, warm_up, place, allow_buffered)
    cells = bench_policies(
        bench, split_list(policies, "--policies"), split_list(memory, "--memory"), _links(link_bandwidth), repeats
    )
    rows = _collect(cells, _settings([bench], repeats), report, as_json)
    if plot:
        plot_speeds(rows, plot)


def paper(
    stores: Annotated[
        list[Path],
        typer.Argument(
            metavar="STORE4 STORE3 STORE2",
            help="Stores of one model at 4, 3 and 2 bits, with lookahead gates.",
            autocompletion=completion.models,
        ),
    ],
    memory: Memory = BenchConfig.paper_memory,
    link_bandwidth: Links = None,
    prompts: Prompts = None,
    tokens: Tokens = BenchConfig.tokens,
    warm_up: WarmUp = BenchConfig.warm_up,
    repeats: Repeats = BenchConfig.repeats,
    threads: options.Threads = EngineConfig.threads,
    device: options.Device = EngineConfig.device,
    host_memory: options.HostMemory = EngineConfig.host_memory,
    allow_buffered: Buffered = False,
    report: options.Report = None,
    as_json: options.Json = False,
) -> None:
    """Repeat the paper's comparison: Mixtral-offloading, then its method one step at a time, at each bit width."""
    from foregate.bench.live import Place
    from foregate.bench.paper import bench_paper

    _check_outputs(report)
    place = Place(device, host_memory, threads)
    benches = [_bench(store, prompts, tokens, warm_up, place, allow_buffered) for store in stores]
    cells = bench_paper(benches, split_list(memory, "--memory"), _links(link_bandwidth), repeats)
    _collect(cells, _settings(benches, repeats), report, as_json)


def validate(
    model: options.Model,
    policies: Policies = "lru,lookahead",
    memory: Memory = BenchConfig.memory,
    link_bandwidth: Links = None,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Text to continue.")] = "And the LORD said unto Moses,",
    tokens: Tokens = BenchConfig.tokens,
    warm_up: WarmUp = BenchConfig.warm_up,
    threads: options.Threads = EngineConfig.threads,
    allow_buffered: Buffered = False,
    report: options.Report = None,
    as_json: options.Json = False,
    bits: options.Bits = None,
    yes: options.Yes = False,
) -> None:
    """Compare the simulator with the engine: the same calls, on the machine that was measured while they ran."""
    from foregate.bench.live import Place, Script
    from foregate.bench.policies import Bench
    from foregate.bench.validate import validate as validated
    from foregate.cli.models import open_model
    from foregate.cli.tables import print_validation
    from foregate.report import deliver

    _check_outputs(report)
    place, script = Place(threads=threads), Script((prompt,), tokens, warm_up)
    bench = Bench(open_model(model, bits, yes), script, place, allow_buffered, _announce)
    settings = split_list(policies, "--policies"), split_list(memory, "--memory"), _links(link_bandwidth)
    rows = list(validated(bench, *settings))
    if not as_json:
        print_validation(rows)
    _warn(row.live.foreign_load for row in rows)
    deliver({**_settings([bench], 1), "rows": [row.to_json() for row in rows]}, report, as_json)


COMMANDS = {
    policies: "foregate bench policies model.store --memory 25%,50% --report policies.json --plot policies.png",
    paper: "foregate bench paper model-4bit.store model-3bit.store model-2bit.store",
    validate: "foregate bench validate model.store --memory 25% --link-bandwidth 500MB",
}


def _bench(store: Path, prompts: Path | None, tokens: int, warm_up: int, place: Place, allow_buffered: bool) -> Bench:
    from foregate import ForegateError
    from foregate.bench import live
    from foregate.bench.policies import Bench

    texts = live.PROMPTS
    if prompts is not None:
        try:
            texts = tuple(line for line in prompts.read_text("utf-8").splitlines() if line.strip())
        except UnicodeDecodeError:
            raise ForegateError(f"--prompts {prompts} is not UTF-8 text: convert it first") from None
    return Bench(store, live.Script(texts, tokens, warm_up), place, allow_buffered, _announce)


def _links(text: str | None) -> list[float | None]:
    return list(parse_bandwidths(text, "--link-bandwidth")) if text else [None]


def _collect(cells: Any, settings: dict[str, Any], report: Path | None, as_json: bool) -> list[dict[str, Any]]:
    """The rows of all cells, each printed when it is measured, and delivered together."""
    from foregate.cli.tables import print_live
    from foregate.report import deliver

    rows: list[dict[str, Any]] = []
    for cell in cells:
        if not as_json:
            print_live(cell)
        rows += cell
    _warn(row["foreign_load"] for row in rows)
    deliver({**settings, "rows": rows}, report, as_json)
    return rows


def _settings(benches: list[Bench], repeats: int) -> dict[str, Any]:
    import os
    import platform
    from dataclasses import asdict

    first = benches[0]
    script = {"prompts": first.script.prompts, "tokens": first.script.tokens, "warm_up": first.script.warm_up}
    machine = {"platform": platform.platform(), "cpus": os.cpu_count(), **asdict(first.place)}
    return {
        "stores": [bench.store.name for bench in benches],
        "script": script,
        "repeats": repeats,
        "machine": machine,
        "buffered": first.allow_buffered,
    }


def _check_outputs(report: Path | None, plot: Path | None = None) -> None:
    from foregate.drawing import check_plot
    from foregate.report import check_report_path

    if report:
        check_report_path(report)
    if plot:
        check_plot(plot)


def _announce(line: str) -> None:
    typer.echo(line, err=True)


def _warn(loads: Any) -> None:
    worst = max((load for load in loads if load is not None), default=0.0)
    if worst > BenchConfig.foreign_load:
        _announce(f"warning: other programs took up to {worst:.0%} of this machine: the timings are not to be trusted")
