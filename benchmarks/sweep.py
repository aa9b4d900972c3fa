"""Policies x budgets x links x models x bits in the simulator, with cells made to hurt; one JSON, one figure a model and bits.

    python benchmarks/sweep.py --model NAME TRACE GATES MACHINE ... --json OUT --figures FOLDER

`--model` may be given several times; MACHINE is a JSON that foregate bench validate wrote for the model's 4-bit store: the
machine's times are medians over its rows. At 3 and 2 bits an expert is smaller and takes as much less time. With
`--foreign NAME TRACE` a trace of a text in a language the gates have not seen joins the adversarial cells. Everything is
simulated; docs/benchmarks.md says how far that can be trusted.
"""

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch

from foregate.bench.plots import plot_speeds
from foregate.lookahead.gates import LookaheadGates
from foregate.lookahead.trace import Trace
from foregate.quantize.matrix import BLOCK
from foregate.simulate import Machine
from foregate.simulate.cells import simulate_cells
from foregate.simulate.workload import Workload

POLICIES = (
    *("lru", "mixtral-offloading", "mixtral-offloading-code", "lookahead"),
    *("clairvoyant", "clairvoyant-horizon", "clairvoyant-determined"),
)
SIMPLE = ("lru", "mixtral-offloading", "mixtral-offloading-code")  # what lookahead must never lose to
MEMORY = ("12.5%", "25%", "50%", "75%")
LINKS = (0.25e9, 1e9, 4e9, 12e9)  # bytes/s: a slow disk, a good one, a better one, and a link that hides all
SATURATED = 0.05e9
BITS_PER_WEIGHT = {4: 4 + 16 / BLOCK, 3: 3 + 16 / BLOCK, 2: 2 + 40 / BLOCK}  # scales and zero points among them
ALTERNATING = 32  # tokens of a text before another takes over
OPEN = 1.3  # times mixtral-offloading, that the bound of a cell must reach for it to be open
WORKERS = 2
MACHINE_FIELDS = ("record_bytes", "layer_seconds", "expert_seconds", "call_seconds", "token_seconds")


@dataclass(frozen=True)
class Model:
    """A model to sweep: where its trace, gates and measured machine are."""

    name: str
    trace: Path
    gates: Path
    machine: Path


@dataclass(frozen=True)
class Job:
    """One process's share: a model at a number of bits under one kind of workload."""

    model: Model
    kind: str
    bits: int
    memory: tuple[str, ...]
    links: tuple[float, ...]
    tokens: int
    warm_up: int
    foreign: Path | None = None


def jobs(models: list[Model], foreign: dict[str, Path], tokens: int, warm_up: int, quick: bool) -> Iterator[Job]:
    """The plain sweep at every width, then what is meant to hurt at 4 bits."""
    memory, links = (MEMORY[1:2], LINKS[1:2]) if quick else (MEMORY, LINKS)
    for model in models:
        for bits in BITS_PER_WEIGHT:
            yield Job(model, "plain", bits, memory, links, tokens, warm_up)
        for kind in ("shuffled gates", "alternating texts", "one text"):
            yield Job(model, kind, 4, memory, links, tokens, warm_up)
        yield Job(model, "saturated link", 4, memory, (SATURATED,), tokens, warm_up)
        if model.name in foreign:
            yield Job(model, "unseen language", 4, memory, links, tokens, warm_up, foreign[model.name])


def work(job: Job) -> list[dict[str, Any]]:
    """All cells of a job as rows."""
    torch.set_num_threads(1)
    trace = Trace(job.foreign or job.model.trace)
    gates = LookaheadGates.load(job.model.gates, trace.layers)
    if job.kind == "shuffled gates":
        shuffle(gates)
    workload = Workload(trace, gates, rows_of(trace, job.kind, job.tokens))
    machine = measured(job.model.machine, job.bits)
    cells = simulate_cells(workload, POLICIES, job.memory, job.links, machine, warm_up=job.warm_up)
    return [
        {"model": job.model.name, "kind": job.kind, "bits": job.bits, **result.to_json(), **against(result, cell)}
        for cell in cells
        for result in cell
    ]


def against(result: Any, cell: list[Any]) -> dict[str, float]:
    """Ratio to the best simple policy, and the share of the way from lru to the clairvoyant bound."""
    speeds = {other.policy: other.tokens_per_second for other in cell}
    room = speeds["clairvoyant"] - speeds["lru"]
    return {
        "ratio_to_best_simple": result.tokens_per_second / max(speeds[name] for name in SIMPLE),
        "gap_closed": (result.tokens_per_second - speeds["lru"]) / room if room > 1e-9 * speeds["lru"] else None,
    }


def measured(path: Path, bits: int) -> Machine:
    """The machine of a validation's rows; smaller records take as much less time to compute."""
    rows = [row["machine"] for row in json.loads(path.read_text())["rows"]]
    machine = Machine(link_bandwidth=1.0, **{name: median(row[name] for row in rows) for name in MACHINE_FIELDS})
    share = BITS_PER_WEIGHT[bits] / BITS_PER_WEIGHT[4]
    predicting = {
        name: max(row[name] for row in rows) for name in ("gate_seconds", "start_seconds")
    }  # others have none
    return replace(
        machine,
        record_bytes=int(machine.record_bytes * share),
        expert_seconds=machine.expert_seconds * share,
        **predicting,
    )


def rows_of(trace: Trace, kind: str, tokens: int) -> torch.Tensor:
    """Rows of the trace in the order in which the job decodes them: int64 [tokens]."""
    everything = torch.arange(trace.num_tokens)
    texts = torch.empty(trace.num_tokens, dtype=torch.int64)
    for sequence in trace.sequences:
        texts[sequence.start : sequence.start + sequence.length] = sequence.text
    own = [everything[texts == text] for text in texts.unique().tolist()]
    if kind == "one text":
        return max(own, key=len)[:tokens]
    if kind == "alternating texts":
        turns = zip(*(rows.split(ALTERNATING) for rows in own), strict=False)
        return torch.cat([part for turn in turns for part in turn])[:tokens]
    return everything[:tokens]


def shuffle(gates: LookaheadGates) -> None:
    """Weights as large as before and without meaning."""
    generator = torch.Generator().manual_seed(0)
    for gate in gates.gates:
        for parameter in gate.parameters():
            flat = parameter.data.flatten()
            parameter.data = flat[torch.randperm(len(flat), generator=generator)].view_as(parameter)


def draw(rows: list[dict[str, Any]], folder: Path) -> None:
    """A figure for each model and number of bits of the plain sweep."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = set(POLICIES) - {"clairvoyant-determined"}  # too near to clairvoyant-horizon to be told apart
    plain = [row for row in rows if row["kind"] == "plain" and row["policy"] in drawn]
    for model, bits in dict.fromkeys((row["model"], row["bits"]) for row in plain):
        own = [row for row in plain if (row["model"], row["bits"]) == (model, bits)]
        plot_speeds(own, folder / f"sweep-{model}-{bits}bit.png", f"{model}, experts at {bits} bits, simulated")


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How lookahead does in the cells of every model and kind, at its worst and on average.

    `open` cells are those whose bound is at least OPEN times mixtral-offloading; `slow_half` those at 50 % in which, under
    mixtral-offloading, the link is busier than the processor.
    """
    cells: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = row["model"], row["kind"], row["bits"], row["memory"], row["link_bandwidth"]
        cells.setdefault(key, {})[row["policy"]] = row
    found = []
    for model, kind in dict.fromkeys(key[:2] for key in cells):
        own = [cell for key, cell in cells.items() if key[:2] == (model, kind)]
        ours = [cell["lookahead"] for cell in own]
        room = [cell for cell in own if cell["clairvoyant"]["ratios"]["mixtral-offloading"] >= OPEN]
        slow_half = [cell for cell in room if cell["lookahead"]["memory"] == "50%" and link_bound(cell)]
        closed = [row["gap_closed"] for row in ours if row["gap_closed"] is not None]
        found.append(
            {
                "model": model,
                "kind": kind,
                "cells": len(own),
                "least_of_best_simple": min(row["ratio_to_best_simple"] for row in ours),
                "least_of_horizon": min(row["ratios"]["clairvoyant-horizon"] for row in ours),
                "mean_of_horizon": geometric_mean([row["ratios"]["clairvoyant-horizon"] for row in ours]),
                "least_of_determined": min(row["ratios"]["clairvoyant-determined"] for row in ours),
                "mean_gap_closed": sum(closed) / len(closed) if closed else None,
                "open_cells": len(room),
                "open_over_mixtral_offloading": over_baseline(room),
                "slow_half_cells": len(slow_half),
                "slow_half_over_mixtral_offloading": over_baseline(slow_half),
                "slow_half_least": min((ratio_to_baseline(cell) for cell in slow_half), default=None),
                "slow_half_most": max((ratio_to_baseline(cell) for cell in slow_half), default=None),
            }
        )
    return found


def link_bound(cell: dict[str, dict[str, Any]]) -> bool:
    """Whether mixtral-offloading's link is busier than its processor."""
    baseline = cell["mixtral-offloading"]
    return baseline["link_share"] > 1 - baseline["stall_share"]


def ratio_to_baseline(cell: dict[str, dict[str, Any]]) -> float:
    return cell["lookahead"]["ratios"]["mixtral-offloading"]


def over_baseline(cells: list[dict[str, dict[str, Any]]]) -> float | None:
    return geometric_mean([ratio_to_baseline(cell) for cell in cells]) if cells else None


def print_summary(summary: list[dict[str, Any]]) -> None:
    for row in summary:
        print(" | ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", nargs=4, action="append", required=True, metavar=("NAME", "TRACE", "GATES", "MACHINE")
    )
    parser.add_argument("--foreign", nargs=2, action="append", default=[], metavar=("NAME", "TRACE"))
    parser.add_argument("--tokens", type=int, default=768, help="of each trace")
    parser.add_argument("--warm-up", type=int, default=128, help="of them, before counting starts")
    parser.add_argument("--quick", action="store_true", help="one budget and link only, to see that it runs")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--figures", type=Path)
    args = parser.parse_args()
    models = [Model(name, *map(Path, paths)) for name, *paths in args.model]
    foreign = {name: Path(trace) for name, trace in args.foreign}
    planned, rows = list(jobs(models, foreign, args.tokens, args.warm_up, args.quick)), []
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        for job, found in zip(planned, pool.map(work, planned), strict=True):
            rows += found
            print(f"{job.model.name}, {job.kind}, {job.bits} bits: {len(found)} rows", flush=True)
    machines = {
        f"{model.name}-{bits}bit": asdict(measured(model.machine, bits)) for model in models for bits in BITS_PER_WEIGHT
    }
    settings = {"tokens": args.tokens, "warm_up": args.warm_up, "machines": machines}
    summary = summarise(rows)
    args.json.write_text(json.dumps({**settings, "summary": summary, "rows": rows}, indent=1) + "\n")
    print_summary(summary)
    if args.figures:
        draw(rows, args.figures)


if __name__ == "__main__":
    main()
