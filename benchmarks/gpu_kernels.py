"""The Triton kernels on a GPU: checked against the reference, then timed against the card's memory.

    python benchmarks/gpu_kernels.py --out benchmarks/results/gpu-kernels.json     # --tune first finds configurations
    python benchmarks/gpu_kernels.py --dry-run                                     # tiny, on the CPU, no timing to trust

Decode reads every chosen expert's record once and almost nothing else: bytes of records over time, beside what a plain
device copy moves (its reads and writes together). Calls are recorded in a CUDA graph, as decoding replays them, and take
turns over more records than the card's cache holds. Prompts are counted in multiplications and additions per second.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

import torch
import triton
from torch import nn

from foregate.checkpoint.store import RecordLayout
from foregate.kernels.activation import apply_activation
from foregate.kernels.cpu import Activation
from foregate.kernels.slots import Rows, SlotReference, choose_slot_kernel
from foregate.kernels.triton.configs import card_name, write_tuned
from foregate.kernels.triton.kernel import TritonKernel
from foregate.kernels.triton.tune import tune
from foregate.quantize.matrix import QuantizedMatrix

SHAPES = {  # hidden, inner, experts per token
    "mixtral": (4096, 14336, 2),
    "qwen3": (2048, 768, 8),
    "olmoe": (2048, 1024, 8),
    "gpt-oss": (2880, 2880, 4),
}
TINY = (136, 72, 2)
SLOTS_BYTES = 4 << 30  # of records that take turns, beyond every cache
COPY_BYTES = 1 << 30
PROMPT_TOKENS = 2048
REPEATS = 20
CHOICES = 64  # of a token's experts, timed together
DRY = "--dry-run" in sys.argv
DEVICE = torch.device("cpu" if DRY else "cuda")
DTYPE = torch.float16 if DRY else torch.bfloat16


class Experts(nn.Module):
    """An experts module with the gate that most families have."""

    has_gate = True

    def _apply_gate(self, first: torch.Tensor) -> torch.Tensor:
        return apply_activation(Activation(), first)


def main() -> None:
    """Check, time, print a table, write the raw figures; exit status 1 when a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["mixtral", "qwen3"])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4], help="tokens decoded at a time")
    parser.add_argument("--tune", action="store_true", help="find configurations first and keep them for this card")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes under Triton's interpreter")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        parser.error("there is no CUDA device: use --dry-run")
    if DRY and arguments.tune:
        parser.error("the interpreter's times say nothing: tune on a card")
    copy = copy_bandwidth()
    print(f"{card_name(DEVICE)}: a device copy moves {copy:.0f} GB/s")
    rows = [row for shape in arguments.shape for bits in arguments.bits for row in measure(shape, bits, arguments)]
    for row in rows:
        print(json.dumps(row))
    if arguments.out:
        facts = {**machine(), "dry_run": DRY, "copy_gigabytes_per_second": copy, "rows": rows}
        arguments.out.write_text(json.dumps(facts, indent=1) + "\n")
    sys.exit(not all(row.get("passed", True) for row in rows))


def measure(shape: str, bits: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Checks and timings of one shape and width."""
    hidden_size, inner, top_k = TINY if DRY else SHAPES[shape]
    kernel = random_kernel(bits, hidden_size, inner, top_k)
    kernel.prepare(DTYPE, top_k)
    common = {"shape": shape, "bits": bits}
    if arguments.tune:
        one, prompt = random_hidden(1, hidden_size), random_hidden(PROMPT_TOKENS, hidden_size)
        tuned = tune(kernel, one, turns(kernel, 1, top_k)[:CHOICES], timed, grouped=False)
        tuned |= tune(kernel, prompt, turns(kernel, PROMPT_TOKENS, top_k)[:1], timed, grouped=True)
        write_tuned(card_name(DEVICE), tuned)
    rows = [{**common, **check} for check in checks(kernel, top_k)]
    for tokens in arguments.tokens:
        rows.append({**common, "note": kernel.note, **decode_speed(kernel, tokens, top_k)})
    rows.append({**common, "note": kernel.note, **prompt_speed(kernel, 20 if DRY else PROMPT_TOKENS, top_k)})
    return rows


def random_kernel(bits: int, hidden: int, inner: int, top_k: int) -> TritonKernel:
    """A layer whose slots are full of random records."""
    up, down = QuantizedMatrix.outline(bits, 2 * inner, hidden), QuantizedMatrix.outline(bits, hidden, inner)
    layout = RecordLayout.of({"gate_up_proj": up, "down_proj": down})
    count = 2 * top_k if DRY else max(4 * top_k, SLOTS_BYTES // layout.nbytes)
    slots = torch.empty(count, layout.nbytes, dtype=torch.uint8, device=DEVICE)
    for slot in slots:  # one at a time: random numbers take no second copy
        slot.random_(0, 256)
        weights = layout.unpack(slot)
        for name, cols in (("gate_up_proj", hidden), ("down_proj", inner)):
            weights[name].planes["base"].fill_(0.5 / 2**bits / cols**0.5)
            weights[name].planes["scales"] &= 15
    return choose_slot_kernel("triton", Experts(), layout, slots)


def random_hidden(tokens: int, size: int) -> torch.Tensor:
    return torch.randn(tokens, size, device=DEVICE).to(DTYPE)


def turns(kernel: TritonKernel, tokens: int, top_k: int) -> list[torch.Tensor]:
    """Choices of slots, int32 [tokens, k] each, that together use all slots; a token's experts are different."""
    count = len(kernel.slots) // top_k
    order = torch.randperm(count * top_k, device=DEVICE).view(count, top_k).int()
    return [order[torch.arange(first, first + tokens) % count].contiguous() for first in range(0, count, tokens)]


def checks(kernel: TritonKernel, top_k: int) -> list[dict[str, Any]]:
    """Against the reference, and against itself in another order."""
    reference = SlotReference(kernel.experts, kernel.layout, kernel.slots)
    hidden = random_hidden(3, kernel.layout.params[1].shape[0])
    slots = turns(kernel, 3, top_k)[0]
    weights = torch.rand(3, top_k, device=DEVICE)
    places = torch.arange(slots.numel(), dtype=torch.int32, device=DEVICE)
    rows = Rows(slots.view(-1), places // top_k, places)
    order = torch.randperm(len(places), device=DEVICE)
    shuffled = Rows(*(part[order].contiguous() for part in (rows.slots, rows.tokens, rows.places)))
    found = []
    for grouped, tolerance in ((False, 1e-5), (True, 4 * torch.finfo(DTYPE).eps)):
        results = [torch.zeros(len(places), hidden.shape[1], device=DEVICE) for _ in range(3)]
        for run, given, into in zip((reference, kernel, kernel), (rows, rows, shuffled), results, strict=True):
            run.run(hidden, given, into, grouped)
        error = ((results[1] - results[0]).norm() / results[0].norm()).item()
        same = torch.equal(results[1], results[2])
        name = "grouped" if grouped else "decode"
        found.append({"check": name, "relative_error": error, "same_bits": same, "passed": same and error < tolerance})
        if not grouped:
            fused, apart = (torch.empty(3, hidden.shape[1], device=DEVICE) for _ in range(2))
            kernel.decode(hidden, slots, weights, fused)
            kernel.combine(results[1], slots, weights, apart)
            found.append(
                {"check": "fused sum", "same_bits": torch.equal(fused, apart), "passed": torch.equal(fused, apart)}
            )
    return found


def decode_speed(kernel: TritonKernel, tokens: int, top_k: int) -> dict[str, Any]:
    """Time of a layer's experts, and bytes of their records read per second."""
    hidden = random_hidden(tokens, kernel.layout.params[1].shape[0])
    weights, total = torch.rand(tokens, top_k, device=DEVICE), torch.empty_like(hidden)
    chosen = turns(kernel, tokens, top_k)[: 1 if DRY else CHOICES]
    milliseconds = timed(lambda: [kernel.decode(hidden, slots, weights, total) for slots in chosen]) / len(chosen)
    nbytes = tokens * top_k * kernel.layout.packed_bytes
    return {
        "decode_tokens": tokens,
        "microseconds": 1000 * milliseconds,
        "record_bytes": nbytes,
        "gigabytes_per_second": nbytes / milliseconds / 1e6,
    }


def prompt_speed(kernel: TritonKernel, tokens: int, top_k: int) -> dict[str, Any]:
    """Time of a layer's experts for a prompt that is spread evenly over 4 k experts."""
    size = kernel.layout.params[1].shape[0]
    hidden, count = random_hidden(tokens, size), tokens * top_k
    places = torch.arange(count, dtype=torch.int32, device=DEVICE)
    slots = torch.stack([torch.randperm(min(4 * top_k, len(kernel.slots)))[:top_k] for _ in range(tokens)])
    rows = Rows(slots.int().view(-1).to(DEVICE), places // top_k, places)
    outputs = torch.empty(count, size, device=DEVICE)
    milliseconds = timed(lambda: kernel.run(hidden, rows, outputs, grouped=True))
    weights = sum(torch.Size(param.shape).numel() for param in kernel.layout.params)
    return {
        "prompt_tokens": tokens,
        "milliseconds": milliseconds,
        "teraflops": 2 * weights * count / milliseconds / 1e9,
    }


def copy_bandwidth() -> float:
    """GB/s that a device copy reads and writes."""
    source = torch.ones((1 << 20 if DRY else COPY_BYTES) // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source)) / 1e6


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds of a call, the median of some replays of its CUDA graph."""
    if DRY:
        start = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start)
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    taken = []
    for _ in range(REPEATS + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    return statistics.median(taken[2:])


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "card": card_name(DEVICE),
    }
    if not DRY:
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit",
            "--format=csv,noheader",
        ]
        properties = torch.cuda.get_device_properties(DEVICE)
        facts |= {
            "driver, clocks, power": subprocess.check_output(query, text=True).strip(),
            "capability": torch.cuda.get_device_capability(DEVICE),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return facts


if __name__ == "__main__":
    main()
