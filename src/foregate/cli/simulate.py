"""`foregate simulate`: what policies would reach on other budgets, links and machines, from a trace."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from foregate.cli import options
from foregate.cli.units import format_seconds, parse_bandwidths, parse_seconds, split_list
from foregate.config import SimulateConfig

if TYPE_CHECKING:
    from foregate.lookahead.gates import LookaheadGates
    from foregate.lookahead.trace import Trace
    from foregate.schedule import Shape
    from foregate.simulate import Machine

NAME = "simulate"
EXAMPLE = "foregate simulate --trace model.trace --gates model.store --link-bandwidth 500MB,2GB"
ALL_POLICIES = "lru,mixtral-offloading,mixtral-offloading-code,lookahead,clairvoyant,clairvoyant-horizon"
UNTRAINED = "untrained"


def _time(default: float, what: str) -> Any:
    return typer.Option(metavar="TIME", help=f"{what}; by default {format_seconds(default)}, or the machine's.")


def run(
    trace: Annotated[Path, typer.Option(metavar="DIR", help="Trace whose routing is repeated (foregate trace).")],
    gates: Annotated[
        str,
        typer.Option(
            metavar="FILE|STORE", help="Gates of the traced model: a file, a store that has them, or untrained."
        ),
    ] = UNTRAINED,
    policy: Annotated[str, typer.Option(metavar="NAMES", help="Policies, joined by commas.")] = ALL_POLICIES,
    memory: Annotated[
        str, typer.Option(metavar="SIZES", help="Shares of the experts, or bytes for them, joined by commas.")
    ] = SimulateConfig.memory,
    link_bandwidth: Annotated[
        str | None, typer.Option(metavar="SPEEDS", help="Bytes a second of the link, such as 250MB,1GB.")
    ] = None,
    record_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Size of an expert's record; by default that of the store in --gates."),
    ] = None,
    machine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A machine that is not here, such as mixtral-8x7b-4bit-12gb-pcie4 (docs/benchmarks.md).",
        ),
    ] = None,
    link_latency: Annotated[
        str | None, _time(SimulateConfig.link_latency, "Fixed time of a record on the link")
    ] = None,
    layer_time: Annotated[str | None, _time(SimulateConfig.layer_time, "A layer without its experts")] = None,
    expert_time: Annotated[str | None, _time(SimulateConfig.expert_time, "One expert")] = None,
    token_time: Annotated[
        str | None, _time(SimulateConfig.token_time, "Embedding, output and sampling of a token")
    ] = None,
    gate_time: Annotated[str | None, _time(SimulateConfig.gate_time, "One prediction of the gates")] = None,
    tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens of the trace, from its start; 0: all.")
    ] = SimulateConfig.tokens,
    warm_up: Annotated[
        int, typer.Option(metavar="N", help="Of them, tokens before counting starts.")
    ] = SimulateConfig.warm_up,
    report: options.Report = None,
    plot: options.Plot = None,
    as_json: options.Json = False,
) -> None:
    """Repeat a trace's routing on a machine made of numbers, under the schedulers the engine uses."""
    from foregate import ForegateError
    from foregate.bench.plots import plot_speeds
    from foregate.cli.tables import print_simulated
    from foregate.drawing import check_plot
    from foregate.lookahead.trace import Trace
    from foregate.report import check_report_path, deliver
    from foregate.simulate.cells import simulate_cells
    from foregate.simulate.workload import Workload

    if report:
        check_report_path(report)
    if plot:
        check_plot(plot)
    opened = Trace(trace)
    count = min(tokens, opened.num_tokens) if tokens > 0 else opened.num_tokens
    if not 0 <= warm_up < count:
        raise ForegateError(f"--warm-up {warm_up}: fewer than the {count} tokens that are simulated")
    workload = Workload(opened, _find_gates(gates, opened), slice(0, count))
    links = parse_bandwidths(link_bandwidth, "--link-bandwidth") if link_bandwidth else []
    projected = _projected(machine, workload.shape, record_bytes)
    base = projected.machine if projected else _plain_machine(record_bytes, gates, links)
    times = {
        "link_latency": (link_latency, "--link-latency"),
        "layer_seconds": (layer_time, "--layer-time"),
        "expert_seconds": (expert_time, "--expert-time"),
        "token_seconds": (token_time, "--token-time"),
        "gate_seconds": (gate_time, "--gate-time"),
    }
    base = replace(base, **{name: parse_seconds(*given) for name, given in times.items() if given[0] is not None})
    note = projected.note if projected else ""
    if note and not as_json:
        print(note)
    policies, sizes = split_list(policy, "--policy"), split_list(memory, "--memory")
    scale = projected.time_scale if projected else 1.0
    rows = []
    for cell in simulate_cells(
        workload, policies, sizes, links or [base.link_bandwidth], base, warm_up=warm_up, time_scale=scale
    ):
        if not as_json:
            print_simulated(cell)
        rows += [result.to_json() for result in cell]
    settings = {"trace": opened.path.name, "gates": Path(gates).name, "tokens": count, "warm_up": warm_up}
    deliver({**settings, "machine": asdict(base), "projected": note or None, "rows": rows}, report, as_json)
    if plot:
        plot_speeds(rows, plot, note)


def _find_gates(text: str, trace: Trace) -> LookaheadGates:
    from foregate.checkpoint.source import GATES_FILE
    from foregate.config import AlignConfig
    from foregate.lookahead.gates import LookaheadGates
    from foregate.lookahead.untrained import untrained_of_trace

    if text == UNTRAINED:
        return untrained_of_trace(trace, AlignConfig.horizon)
    path = Path(text)
    return LookaheadGates.load(path / GATES_FILE if path.is_dir() else path, trace.layers)


class _Projected(NamedTuple):
    """A machine that is not here, as far as a trace's model can stand for the one it runs."""

    machine: Machine
    time_scale: float
    note: str


def _projected(name: str | None, shape: Shape, record_bytes: str | None) -> _Projected | None:
    from foregate import ForegateError
    from foregate.simulate.presets import preset

    if name is None:
        return None
    chosen = preset(name)
    if record_bytes:
        raise ForegateError("--record-bytes and --machine both name the size of an expert: leave one out")
    return _Projected(chosen.machine(shape), chosen.time_scale(shape), chosen.describe(shape))


def _plain_machine(record_bytes: str | None, gates: str, links: list[float]) -> Machine:
    from foregate import ForegateError
    from foregate.checkpoint.store import Store
    from foregate.simulate import Machine
    from foregate.sizes import parse_bytes

    if not links:
        raise ForegateError("name the link with --link-bandwidth, or a machine with --machine")
    if record_bytes is not None:
        size = parse_bytes(record_bytes, "--record-bytes")
    elif Path(gates).is_dir():
        size = Store(gates).record_bytes
    else:
        raise ForegateError("name the size of an expert with --record-bytes, a store with --gates, or a --machine")
    if size < 1:
        raise ForegateError(f"--record-bytes {record_bytes}: a record has at least one byte")
    return Machine(
        record_bytes=size,
        link_bandwidth=links[0],
        link_latency=SimulateConfig.link_latency,
        layer_seconds=SimulateConfig.layer_time,
        expert_seconds=SimulateConfig.expert_time,
        token_seconds=SimulateConfig.token_time,
        gate_seconds=SimulateConfig.gate_time,
    )
