"""How far gates go towards the ceiling: the best gate of any size with the same inputs.

    python benchmarks/gate_ceiling.py GATES TRAIN_TRACE HELDOUT_TRACE --sources 1,4 \\
      --ablation benchmarks/results/gate-ablation-mixtral.json --json OUT

For each source, on the same held-out text: the untrained gate, the gate of the file, and a gate of width 1024 trained as
the product trains on the whole training trace, at a rate that suits it. The ablation's ceilings, of fewer tokens, are
put beside them. Results are added to OUT source by source.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from foregate.config import AlignConfig
from foregate.lookahead.fit import fit_gate, recall
from foregate.lookahead.gate import LookaheadGate, untrained_gate
from foregate.lookahead.gates import LookaheadGates
from foregate.lookahead.samples import SourceSamples, gate_layers, router_weights
from foregate.lookahead.trace import Trace

WIDTH = 1024
SETTINGS = replace(AlignConfig(), learning_rate=1e-3, epochs=5)
CPU = torch.device("cpu")

Row = dict[str, Any]


def measure(gates: LookaheadGates, train: Trace, heldout: Trace, source: int) -> Row:
    """Recalls of one source, by horizon."""
    started, horizon = time.process_time(), gates.header.horizon
    samples, judged = SourceSamples(train, source, horizon), SourceSamples(heldout, source, horizon)
    layers, routers = gate_layers(train), router_weights(train)
    untrained = untrained_gate(layers, routers, source, horizon, WIDTH, samples.input_size)

    def found(gate: LookaheadGate) -> list[float]:
        return list(recall(judged, gate, judged.rows, CPU))

    return {
        "source": source,
        "targets": [list(target) for target in judged.targets],
        "untrained": found(untrained),
        "gate": found(gates.gates[source]),
        "ceiling": found(fit_gate(samples, untrained, SETTINGS, CPU).gate),
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def ablation_ceilings(path: Path | None) -> dict[int, list[float]]:
    """The best recalls of gates with the product's inputs that gate_ablation.py trained, by source."""
    found: dict[int, list[float]] = {}
    for row in json.loads(path.read_text())["ceiling"] if path else []:
        if "more inputs" not in row["gate"]:
            best = found.get(row["source"], [0.0] * len(row["recall"]))
            found[row["source"]] = [max(pair) for pair in zip(best, row["recall"], strict=True)]
    return found


def table(rows: list[Row]) -> None:
    """Print the way of each source and horizon. A source's ceiling is never below its gate."""
    print(
        "| source | horizon | untrained | gate | ceiling | ablation's | miss closed: gate | ceiling | way | ablation's |"
    )
    print("|" + "---|" * 10)
    for row in rows:
        for horizon, (start, gate, wide) in enumerate(zip(row["untrained"], row["gate"], row["ceiling"], strict=True)):
            ceiling, earlier = max(gate, wide), row.get("ablation_ceiling", [None] * 9)[horizon]
            closed = [f"{(value - start) / (1 - start):.0%}" for value in (gate, ceiling)]
            ways = [f"{(gate - start) / (end - start):.0%}" if end else "" for end in (ceiling, earlier)]
            recalls = [f"{value:.3f}" if value else "" for value in (start, gate, ceiling, earlier)]
            print("| " + " | ".join([str(row["source"]), str(horizon + 1), *recalls, *closed, *ways]) + " |")


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gates", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--sources", required=True, help="MoE layers")
    parser.add_argument("--ablation", type=Path, help="results of gate_ablation.py")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train, heldout = Trace(arguments.train), Trace(arguments.heldout)
    gates = LookaheadGates.load(arguments.gates, train.layers)
    earlier = ablation_ceilings(arguments.ablation)
    result = json.loads(arguments.json.read_text()) if arguments.json.exists() else {"rows": []}
    result |= {
        "model_class": train.header.model_class,
        "tokens": {"training": train.num_tokens, "heldout": heldout.num_tokens},
        "widths": {"gate": gates.header.width, "ceiling": WIDTH},
    }
    for source in map(int, arguments.sources.split(",")):
        row = measure(gates, train, heldout, source)
        if source in earlier:
            row["ablation_ceiling"] = earlier[source]
        others = [other for other in result["rows"] if other["source"] != source]
        result["rows"] = sorted([*others, row], key=lambda one: one["source"])
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    table(result["rows"])


if __name__ == "__main__":
    main()
