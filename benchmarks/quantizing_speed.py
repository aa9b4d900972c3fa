"""How fast matrices are quantized: millions of weights a second, by quantizer, width and threads.

    python benchmarks/quantizing_speed.py --out benchmarks/results/quantizing_speed.json

Two figures each, the best of some rounds: by the clock, and by the processor time of all threads together, which other
work on the machine slows little. `gptq` is given 4096 random inputs; the time includes its Cholesky factors. It runs on
one thread, as it does in a conversion.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from foregate.kernels import cpu, set_threads
from foregate.quantize import quantizer

ROWS, COLS, SAMPLES = 4096, 2048, 4096
ROUNDS = 3
QUANTIZERS = ("rtn", "hqq", "refit", "gptq")


def main() -> None:
    """Measure, print a Markdown table and write the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quantizing_speed.json"))
    arguments = parser.parse_args()
    rows = measure(arguments.threads)
    facts = {"platform": platform.platform(), "torch": torch.__version__, "cores": os.cpu_count(), "isa": cpu.isa()}
    facts |= {"shape": [ROWS, COLS], "load_average": os.getloadavg()}
    arguments.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    print("| quantizer | bits | threads | M weights/s | M weights/s of processor time |\n|---|---|---|---|---|")
    for row in rows:
        print("| {quantizer} | {bits} | {threads} | {wall:.0f} | {processor:.0f} |".format(**row))


def measure(counts: list[int]) -> list[dict[str, Any]]:
    """One row per quantizer, width and number of threads; rounds are interleaved."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLS, generator=generator) * 0.02
    inputs = torch.randn(SAMPLES, COLS, generator=generator)
    hessian = inputs.T @ inputs
    best: dict[tuple[str, int, int], tuple[float, float]] = {}
    for _ in range(ROUNDS):
        for threads in counts:
            set_threads(threads)
            for name in QUANTIZERS if threads == 1 else QUANTIZERS[:-1]:
                for bits in (4, 3, 2):
                    found = time_once(name, weight, bits, hessian)
                    known = best.get((name, bits, threads), found)
                    best[name, bits, threads] = (min(known[0], found[0]), min(known[1], found[1]))
    millions = weight.numel() / 1e6
    return [
        {
            "quantizer": name,
            "bits": bits,
            "threads": threads,
            "wall": millions / wall,
            "processor": millions / processor,
        }
        for (name, bits, threads), (wall, processor) in sorted(best.items())
    ]


def time_once(name: str, weight: torch.Tensor, bits: int, hessian: torch.Tensor) -> tuple[float, float]:
    """Seconds by the clock and of processor time."""
    given = {"hessian": hessian, "samples": SAMPLES} if name == "gptq" else {}
    start, processor = time.perf_counter(), time.process_time()
    quantizer(name).quantize(weight, bits, **given)
    return time.perf_counter() - start, time.process_time() - processor


if __name__ == "__main__":
    main()
