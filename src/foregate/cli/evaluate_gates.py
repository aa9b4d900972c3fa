"""`foregate evaluate-gates`: how well the lookahead gates foresee experts, beside guesses that need no training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foregate.cli import options
from foregate.config import EngineConfig, EvaluateGatesConfig, TraceConfig

if TYPE_CHECKING:
    from rich.table import Table

    from foregate.lookahead.evaluation import GateEvaluation
    from foregate.lookahead.scores import Score

NAME = "evaluate-gates"
EXAMPLE = "foregate evaluate-gates model.store --text held-out.txt"
HEADINGS = {
    "frequency": "frequency",
    "previous_token": "previous",
    "next_router": "router",
    "untrained_gate": "untrained",
    "gate": "gate",
    "ceiling": "ceiling",
}


def run(
    model: options.Model,
    text: Annotated[
        list[Path],
        typer.Option(metavar="FILE", help="UTF-8 text the gates were not trained on; may be given several times."),
    ] = [],
    trace: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Trace of this model to judge by, instead of texts.")
    ] = None,
    gates: Annotated[Path | None, typer.Option(metavar="FILE", help="The gates; by default the store's own.")] = None,
    fit: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Trace that frequencies and ceiling are taken from; by default the first half of each text, which is "
            "then not judged.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=f"Tokens to use; 0: no limit. By default {EvaluateGatesConfig.max_tokens:,} of texts, all of a trace.",
        ),
    ] = None,
    report: options.Report = None,
    plot: options.Plot = None,
    layers: Annotated[bool, typer.Option("--layers", help="Print a row for every source too.")] = False,
    as_json: options.Json = False,
    window: options.Window = TraceConfig.window,
    memory: options.MemoryOfText = EngineConfig.memory,
    scratch: options.Scratch = None,
    threads: options.Threads = EngineConfig.threads,
    bits: options.Bits = None,
    yes: options.Yes = False,
) -> None:
    """Measure how well the lookahead gates foresee the experts of later layers, beside guesses that need no training."""
    from foregate import evaluate_gates
    from foregate.cli.models import open_model
    from foregate.cli.progress import count_progress
    from foregate.drawing import check_plot
    from foregate.lookahead.gates import write_whole
    from foregate.lookahead.plots import plot_evaluation
    from foregate.report import check_report_path

    if report:
        check_report_path(report)
    if plot:
        check_plot(plot)
    store = open_model(model, bits, yes)
    with count_progress("judging", "sources") as progress:
        result = evaluate_gates(
            store,
            texts=text,
            trace=trace,
            gates=gates,
            fit=fit,
            max_tokens=max_tokens,
            window=window,
            memory=memory,
            threads=threads,
            scratch=scratch,
            announce=lambda line: print(line, file=sys.stderr if as_json else sys.stdout, flush=True),
            progress=progress,
        )
    if report:
        write_whole(report, result.to_json().encode())
    if plot:
        plot_evaluation(result, plot)
    if as_json:
        print(result.to_json())
    else:
        _print(result, layers)


def _print(result: GateEvaluation, layers: bool) -> None:
    from rich.console import Console

    console = Console()
    experts, k = _one_or_range(result.num_experts), _one_or_range(result.top_k)
    print(
        f"{result.model_class}, {result.num_layers} MoE layers of {experts} experts, {k} a token; "
        f"{result.trace['tokens']:,} tokens judged"
    )
    print(f"frequency and ceiling are taken from the {result.fitted_on}")
    if result.gates is None:
        print("the store has no lookahead gates: baselines and untrained gates only (train some with foregate align)")
    for name in result.seen_in_training:
        print(f"{name}: the gates were trained on this text; judge them by another one")
    best = "gate" if result.gates else "untrained_gate"
    methods = [method for method in HEADINGS if any(method in group.scores for group in result.groups)]
    kinds = [(f"{group.kind} +{group.horizon}", group.scores) for group in result.groups]
    console.print(_recall_table(f"recall@{k}", [*kinds, ("all", result.overall)], methods))
    if best in methods:
        console.print(_details_table(f"{HEADINGS[best]}, further", [*kinds, ("all", result.overall)], best))
    if len(result.texts) > 1:
        console.print(_recall_table(f"recall@{k} by text", list(result.texts.items()), methods))
    if layers:
        rows = [(f"{cell.source} +{cell.horizon}", cell.scores) for cell in result.cells]
        console.print(_recall_table(f"recall@{k} by source", rows, methods))


def _recall_table(title: str, rows: list[tuple[str, dict[str, Score]]], methods: list[str]) -> Table:
    table = _table(title, [HEADINGS[method] for method in methods])
    for name, scores in rows:
        table.add_row(name, *(_share(scores[m].recall[0]) if m in scores else "-" for m in methods))
    return table


def _details_table(title: str, rows: list[tuple[str, dict[str, Score]]], method: str) -> Table:
    sure = EvaluateGatesConfig.thresholds
    columns = ["k+1", "k+2", "exact", "AUC", *(f"p≥{threshold:g}" for threshold in sure), "cal. error"]
    table = _table(title, columns)
    for name, scores in rows:
        if method not in scores:
            table.add_row(name, *("-" for _ in columns))
            continue
        score = scores[method]
        values = [*score.recall[1:], score.exact_sets, score.auc]
        pairs = [f"{_share(item.precision)} / {_share(item.covered)}" for item in score.confidence]
        error = "-" if score.calibration_error is None else f"{score.calibration_error:.3f}"
        table.add_row(name, *map(_share, values), *pairs, error)
    table.caption = "p≥: share that was used / share of all used"
    return table


def _table(title: str, columns: list[str]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left", caption_justify="left")
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _one_or_range(values: tuple[int, ...]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)}-{max(values)}"
