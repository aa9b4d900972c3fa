"""The lookahead policy's constants, one at a time, in the simulator: tokens/s against the defaults.

    python benchmarks/scheduler_constants.py --model NAME TRACE GATES MACHINE ... --json OUT

Arguments are those of benchmarks/sweep.py. A row is a constant's value; its figure is the geometric mean, over models,
budgets of 25 and 50 % and links of 0.25, 1 and 4 GB/s, of tokens/s over the default's, with the lowest and highest cell.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from sweep import Model, measured

from foregate.lookahead.gates import LookaheadGates
from foregate.lookahead.trace import Trace
from foregate.schedule import estimates
from foregate.simulate.cells import simulate_cells
from foregate.simulate.workload import Workload

MEMORY = ("25%", "50%")
LINKS = (0.25e9, 1e9, 4e9)  # bytes/s
VALUES = {
    "EVICTED": (0.05, 0.1, 0.3),
    "DELAYED": (0.0, 0.7),
    "PRIOR": (1.0, 16.0),
    "FADE": (0.99, 0.9995),
    "HALF_LIVES": ((32.0,), (4.0,)),
    "BLOCK": (4, 32),
}


def speeds(model: Model, tokens: int, constant: str | None, value: Any) -> list[float]:
    """Tokens/s of `lookahead` in every cell, with one constant changed."""
    torch.set_num_threads(1)
    if constant is not None:
        setattr(estimates, constant, value)
    trace = Trace(model.trace)
    workload = Workload(trace, LookaheadGates.load(model.gates, trace.layers), torch.arange(tokens))
    machine = measured(model.machine, bits=4)
    cells = simulate_cells(workload, ("lookahead",), MEMORY, LINKS, machine, warm_up=tokens // 6)
    return [result.tokens_per_second for cell in cells for result in cell]


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
    default = found.pop((None, None))
    rows: list[dict[str, Any]] = []
    for (constant, value), own in found.items():
        ratios = [speed / usual for speed, usual in zip(own, default, strict=True)]
        usual = getattr(estimates, str(constant))
        row = {
            "constant": constant,
            "default": usual,
            "value": value,
            "tokens_per_second_ratio": geometric_mean(ratios),
        }
        rows.append({**row, "least": min(ratios), "most": max(ratios)})
        print(f"{constant} {usual} -> {value}: {geometric_mean(ratios):.4f} ({min(ratios):.3f} to {max(ratios):.3f})")
    settings = {"memory": MEMORY, "links": LINKS, "tokens": args.tokens, "models": [model.name for model in models]}
    args.json.write_text(json.dumps({**settings, "default_tokens_per_second": default, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
