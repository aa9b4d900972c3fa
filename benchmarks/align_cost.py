"""What alignment costs: seconds of one core against tokens, gates and horizon, and what that means for large models.

    python benchmarks/align_cost.py TRACE --out benchmarks/results/align-cost.json

Fits gates from a trace, one size at a time, and takes the time of the process itself, so that other work on the machine
counts little. The estimate for large models rests on arithmetic per token and on steps; the rates assumed for a GPU are
in the result beside it.
"""

import argparse
import json
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from foregate.config import AlignConfig
from foregate.lookahead.align import default_width
from foregate.lookahead.fit import fit_gate
from foregate.lookahead.gate import GateLayer, untrained_gate
from foregate.lookahead.gates import GatesHeader
from foregate.lookahead.samples import SourceSamples, gate_layers, router_weights
from foregate.lookahead.trace import Trace
from foregate.memory.process import peak_memory_bytes

ROOT = Path(__file__).parents[1]
TOKEN_COUNTS = (25_600, 51_200, 102_400, 204_800)
HORIZONS = (1, 2, 3, 4)
GATE_COUNTS = (1, 2, 4)
STEADY_TOKENS = 51_200  # for the rows that vary something else
GPU_FLOPS = 10e12  # assumed to be reached in float32
GPU_STEP_SECONDS = 4e-3  # assumed for the launches of one step's kernels and the copy of its rows
LARGE = {  # published shapes; backbone: all parameters but the routed experts
    "Mixtral-8x7B": {"layers": 32, "experts": 8, "top_k": 2, "hidden": 4096, "backbone": 1_605_636_096},
    "Qwen3-30B-A3B": {"layers": 48, "experts": 128, "top_k": 8, "hidden": 2048, "backbone": 1_541_093_376},
}
LARGE_TOKENS = 250_000


def main() -> None:
    """Measure, estimate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/align-cost.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trace = Trace(arguments.trace)
    rows = [
        *(measure(trace, tokens=tokens) for tokens in TOKEN_COUNTS),
        *(measure(trace, horizon=horizon) for horizon in HORIZONS),
        *(measure(trace, gates=gates) for gates in GATE_COUNTS),
    ]
    result = {
        "platform": platform.platform(),
        "torch": torch.__version__,
        "model_class": trace.header.model_class,
        "settings": asdict(AlignConfig()),
        "rows": rows,
        "peak_memory_bytes": peak_memory_bytes(),
        "estimates": {name: estimate(**shape) for name, shape in LARGE.items()},
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(
    trace: Trace, *, tokens: int = STEADY_TOKENS, horizon: int = AlignConfig.horizon, gates: int = 1
) -> dict[str, Any]:
    """One row: the time of fitting the gates of the first MoE layers."""
    layers, routers = gate_layers(trace), router_weights(trace)
    header = GatesHeader(layers, trace.header.embedding_size, AlignConfig.horizon, 0, {})
    width = default_width(header, trace.header.backbone_parameters)
    start, wall, flops = time.process_time(), time.perf_counter(), 0
    for source in range(gates):
        samples = SourceSamples(trace, source, horizon, tokens)
        gate = untrained_gate(layers, routers, source, horizon, width, samples.input_size)
        flops += 6 * gate.multiplications * len(samples.training) * AlignConfig.epochs
        fit_gate(samples, gate, AlignConfig(), torch.device("cpu"))
    row = {"tokens": tokens, "horizon": horizon, "gates": gates, "width": width, "flops": flops}
    row |= {
        "cpu_seconds": round(time.process_time() - start, 2),
        "wall_seconds": round(time.perf_counter() - wall, 2),
    }
    print(row, flush=True)
    return row


def estimate(layers: int, experts: int, top_k: int, hidden: int, backbone: int) -> dict[str, Any]:
    """Seconds on one GPU for LARGE_TOKENS tokens: the larger of arithmetic and steps, for all gates."""
    shape = tuple(GateLayer(str(n), experts, top_k, hidden) for n in range(layers))
    header = GatesHeader(shape, hidden, AlignConfig.horizon, 0, {})
    header = replace(header, width=default_width(header, backbone))
    work = 6 * header.new_gate(0).multiplications * AlignConfig.epochs  # a token and gate
    gates = layers + 1
    arithmetic = work * LARGE_TOKENS * gates / GPU_FLOPS
    steps = LARGE_TOKENS // AlignConfig.batch * AlignConfig.epochs * gates * GPU_STEP_SECONDS
    return {
        "tokens": LARGE_TOKENS,
        "gates": gates,
        "width": header.width,
        "flops_per_token_and_gate": work,
        "assumed_gpu_flops": GPU_FLOPS,
        "assumed_seconds_per_step": GPU_STEP_SECONDS,
        "arithmetic_seconds": round(arithmetic, 1),
        "step_seconds": round(steps, 1),
        "seconds": round(max(arithmetic, steps), 1),
    }


if __name__ == "__main__":
    main()
