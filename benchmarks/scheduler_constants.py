"""The lookahead policy's constants, one at a time, in the simulator: tokens/s against the defaults.

    python benchmarks/scheduler_constants.py --model NAME TRACE GATES MACHINE ... --json OUT

Arguments are those of benchmarks/sweep.py. A row is a constant's value; its figure is the geometric mean, over models,
budgets of 25 and 50 % and links of 0.25, 1 and 4 GB/s, of tokens/s over the default's, with the lowest and highest cell.
Half-lives matter where nothing is predicted: `eviction` has the misses then, over LRU's, on texts in a row and on texts that
take turns.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np
import torch
from sweep import Model, measured, rows_of

from foregate.lookahead.gates import LookaheadGates
from foregate.lookahead.trace import Trace
from foregate.memory.budget import count_slots
from foregate.schedule import estimates, lookahead, make_scheduler
from foregate.simulate.cells import simulate_cells
from foregate.simulate.run import run
from foregate.simulate.workload import Workload

MEMORY = ("25%", "50%")
LINKS = (0.25e9, 1e9, 4e9)  # bytes/s
EVICTION_TOKENS = 1024
VALUES = {
    "EVICTED": (0.05, 0.1, 0.3),
    "DELAYED": (0.0, 0.7),
    "PRIOR": (1.0, 16.0),
    "FADE": (0.99, 0.9995),
    "HALF_LIVES": ((32.0,), (4.0,)),
    "BLOCK": (4, 32),
    "LINE": (2, 8),
    "GIVE_UP": (0.5, 0.7),
    "JUDGED": (5,),
    "LATER": ((2.0, 8.5, 24.0), (2.0, 8.5, 96.0)),
}


def speeds(model: Model, tokens: int, constant: str | None, value: Any) -> list[float]:
    """Tokens/s of `lookahead` in every cell, with one constant changed."""
    torch.set_num_threads(1)
    for module in (estimates, lookahead):
        if constant is not None and hasattr(module, constant):
            setattr(module, constant, np.array(value) if constant == "LATER" else value)
    trace = Trace(model.trace)
    workload = Workload(trace, LookaheadGates.load(model.gates, trace.layers), torch.arange(tokens))
    machine = measured(model.machine, bits=4)
    cells = simulate_cells(workload, ("lookahead",), MEMORY, LINKS, machine, warm_up=tokens // 6)
    return [result.tokens_per_second for cell in cells for result in cell]


def misses(model: Model, kind: str, half_lives: tuple[float, ...]) -> list[dict[str, Any]]:
    """Misses of `lookahead` without predictions over those of `lru`, a row for each budget."""
    torch.set_num_threads(1)
    estimates.HALF_LIVES = half_lives
    trace = Trace(model.trace)
    workload = Workload(trace, None, rows_of(trace, kind, EVICTION_TOKENS))
    machine = replace(measured(model.machine, bits=4), link_bandwidth=LINKS[1])
    calls, found = workload.calls("lru"), []
    for memory in MEMORY:
        slots = count_slots(memory, workload.num_experts, max(workload.shape.top_k), machine.record_bytes)
        own, lru = (
            run(calls, make_scheduler(policy, slots, workload.shape), machine, EVICTION_TOKENS // 6).loads
            for policy in ("lookahead", "lru")
        )
        found.append(
            {"model": model.name, "kind": kind, "memory": memory, "half_lives": half_lives, "ratio": own / lru}
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", nargs=4, action="append", required=True, metavar=("NAME", "TRACE", "GATES", "MACHINE")
    )
    parser.add_argument("--tokens", type=int, default=384)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    models = [Model(name, *map(Path, paths)) for name, *paths in args.model]
    trials: list[tuple[str | None, Any]] = [(None, None)]
    trials += [(constant, value) for constant, values in VALUES.items() for value in values]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = {trial: [pool.submit(speeds, model, args.tokens, *trial) for model in models] for trial in trials}
        found = {trial: [speed for future in parts for speed in future.result()] for trial, parts in futures.items()}
        parts = [
            pool.submit(misses, model, kind, half_lives)
            for model in models
            for kind in ("plain", "alternating texts")
            for half_lives in (estimates.HALF_LIVES, *VALUES["HALF_LIVES"])
        ]
        eviction = [row for part in parts for row in part.result()]
    default = found.pop((None, None))
    rows: list[dict[str, Any]] = []
    for (constant, value), own in found.items():
        ratios = [speed / usual for speed, usual in zip(own, default, strict=True)]
        usual = np.asarray(getattr(estimates, str(constant))).tolist()
        row = {
            "constant": constant,
            "default": usual,
            "value": value,
            "tokens_per_second_ratio": geometric_mean(ratios),
        }
        rows.append({**row, "least": min(ratios), "most": max(ratios)})
        print(f"{constant} {usual} -> {value}: {geometric_mean(ratios):.4f} ({min(ratios):.3f} to {max(ratios):.3f})")
    for row in eviction:
        print("misses over lru's, nothing predicted:", *row.values())
    settings = {"memory": MEMORY, "links": LINKS, "tokens": args.tokens, "models": [model.name for model in models]}
    figures = {
        "default_tokens_per_second": default,
        "rows": rows,
        "eviction_tokens": EVICTION_TOKENS,
        "eviction": eviction,
    }
    args.json.write_text(json.dumps({**settings, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
