"""What one prediction of the gates takes, with warm caches and as in a run, where experts have emptied them.

    python benchmarks/gate_latency.py model.store/lookahead.safetensors --json OUT

Microseconds of `observe` and `foresee` for one token, over all layers in turn. Cold: 64 MiB are read before every call.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from foregate.kernels import cpu
from foregate.lookahead.gates import GatesHeader, LookaheadGates
from foregate.lookahead.packed import PackedGates

EMPTYING_BYTES = 64 << 20


def measure(gates: PackedGates, header: GatesHeader, rounds: int, cold: bool) -> dict[str, float]:
    """Quartiles over `rounds` tokens."""
    memory, generator, taken = np.ones(EMPTYING_BYTES // 8), torch.Generator().manual_seed(0), []
    for _ in range(rounds):
        for number, layer in enumerate(header.layers):
            hidden = torch.randn(1, layer.input_size, generator=generator)
            scores = torch.randn(1, layer.num_experts, generator=generator)
            chosen = scores.topk(layer.top_k).indices
            if cold:
                memory.sum()
            else:
                gates.observe(number, scores, chosen)
                gates.foresee(number, hidden)
            start = time.perf_counter()
            gates.observe(number, scores, chosen)
            middle = time.perf_counter()
            gates.foresee(number, hidden)
            taken.append((middle - start, time.perf_counter() - middle))
    quartiles = np.percentile(np.array(taken) * 1e6, [25, 50, 75], axis=0).T
    return {
        f"{name}_{quartile}": float(value)
        for name, values in zip(("observe", "foresee"), quartiles, strict=True)
        for quartile, value in zip(("p25", "median", "p75"), values, strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gates", type=Path)
    parser.add_argument("--rounds", type=int, default=30, help="tokens")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with safe_open(args.gates, framework="pt") as file:
        header = GatesHeader.from_json(file.metadata()["foregate"])
    gates = PackedGates(LookaheadGates.load(args.gates, header.layers))
    shape = {"horizon": header.horizon, "width": header.width, "inputs": header.layers[0].input_size, "isa": cpu.isa()}
    rows = [{"caches": name, **measure(gates, header, args.rounds, name == "cold")} for name in ("cold", "warm")]
    for row in rows:
        print(" ".join(f"{key} {value:.0f}" if isinstance(value, float) else value for key, value in row.items()))
    if args.json:
        args.json.write_text(json.dumps({**shape, "microseconds": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
