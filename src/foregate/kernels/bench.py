"""Timing the native kernels beside what PyTorch offers, in one interleaved run, against this machine's memory bandwidth.

A matrix-vector product reads its weights once: bytes over bandwidth is the floor. Several matrices take turns so that
no cache holds them between two products.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from foregate.errors import ForegateError
from foregate.kernels import cpu
from foregate.quantize.matrix import QuantizedMatrix, plane_shapes

SHAPES = {  # (rows, cols) of an expert's first matrix without its gate half
    "mixtral": (14336, 4096),
    "olmoe": (1024, 2048),
    "qwen3": (768, 2048),
    "gpt-oss": (2880, 2880),
}
TURNS_BYTES = 256 << 20  # of matrices that take turns: beyond every cache
READ_BYTES = 512 << 20  # of the plain read that measures bandwidth
BURST = 8  # calls timed together, as a decode step makes them
SETTLE = 2  # calls before a burst: threads of the call measured before still spin, cores wake up


@dataclass(frozen=True)
class Timing:
    """One row of the benchmark; times in milliseconds, of one product."""

    name: str
    tokens: int
    nbytes: int  # of weights and metadata read
    median: float
    fastest: float
    slowest: float

    @property
    def gigabytes_per_second(self) -> float:
        return self.nbytes / self.median / 1e6


def bench_matmul(shape: str, bits: list[int], tokens: list[int], repeats: int = 15) -> tuple[float, list[Timing]]:
    """(bandwidth of a plain parallel read in GB/s, timings): native kernels and PyTorch's, interleaved.

    Raises ForegateError for an unknown shape, or when the native kernels cannot run here.
    """
    if shape not in SHAPES:
        raise ForegateError(f"unknown shape {shape}: choose one of {', '.join(SHAPES)}")
    if not cpu.available():
        raise ForegateError(f"there are no native kernels to time: {cpu.why_not()}")
    rows, cols = SHAPES[shape]
    calls: dict[tuple[str, int, int], Callable[[int], object]] = {}
    for width in bits:
        matrices = _quantized(width, rows, cols)
        nbytes = sum(plane.nbytes for plane in matrices[0].planes.values())
        for count in tokens:
            x = torch.randn(count, cols)
            for exact in (False, True):
                name = f"native {width}-bit, {'exact' if exact else 'int8'}"
                calls[name, count, nbytes] = _in_turn(matrices, lambda m, x=x, exact=exact: cpu.matmul(x, m, exact))
    calls |= _torch_calls(rows, cols, tokens)
    bandwidth, times = _measure(calls, repeats)
    return bandwidth, [
        Timing(name, count, nbytes, statistics.median(t), min(t), max(t)) for (name, count, nbytes), t in times.items()
    ]


def _torch_calls(rows: int, cols: int, tokens: list[int]) -> dict[tuple[str, int, int], Callable[[int], object]]:
    plain = [torch.randn(rows, cols) for _ in range(_turns(rows * cols * 4))]
    packed = _torch_int4(rows, cols)
    calls: dict[tuple[str, int, int], Callable[[int], object]] = {}
    for count in tokens:
        x = torch.randn(count, cols)
        calls["torch fp32 linear", count, rows * cols * 4] = _in_turn(plain, lambda w, x=x: functional.linear(x, w))
        half = x.to(torch.bfloat16)
        nbytes = sum(part.nbytes for part in packed[0])
        calls["torch int4pack, bf16", count, nbytes] = _in_turn(
            packed, lambda w, half=half: torch.ops.aten._weight_int4pack_mm_for_cpu(half, w[0], 64, w[1])
        )
    return calls


def _torch_int4(rows: int, cols: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    codes = torch.randint(0, 16, (rows, cols), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(cols // 64, rows, 2).to(torch.bfloat16)
    return [(packed.clone(), scales.clone()) for _ in range(_turns(packed.nbytes))]


def _quantized(bits: int, rows: int, cols: int) -> list[QuantizedMatrix]:
    """Random matrices of the record's format, enough to take turns."""
    shapes = plane_shapes(bits, rows, cols)

    def plane(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.ones(shape) if dtype.is_floating_point else torch.randint(0, 256, shape, dtype=dtype)

    one = {name: plane(dtype, shape) for name, (dtype, shape) in shapes.items()}
    turns = _turns(sum(tensor.nbytes for tensor in one.values()))
    return [QuantizedMatrix(bits, rows, cols, {n: t.clone() for n, t in one.items()}) for _ in range(turns)]


def _turns(nbytes: int) -> int:
    return max(2, -(-TURNS_BYTES // nbytes))


def _in_turn(items: list, call: Callable) -> Callable[[int], object]:
    return lambda turn: call(items[turn % len(items)])


def _measure(
    calls: dict[tuple[str, int, int], Callable[[int], object]], repeats: int
) -> tuple[float, dict[tuple[str, int, int], list[float]]]:
    """A burst of every call per round, after a round to warm up; milliseconds a call. Also the bandwidth of a plain read, GB/s."""
    block = torch.ones(READ_BYTES // 4)
    times: dict[tuple[str, int, int], list[float]] = {key: [] for key in calls}
    reads = []
    for turn in range(repeats + 1):
        reads.append(_milliseconds(lambda turn: block.sum(), turn))
        for key, call in calls.items():
            times[key].append(_milliseconds(call, turn))
    return READ_BYTES / statistics.median(reads[1:]) / 1e6, {key: taken[1:] for key, taken in times.items()}


def _milliseconds(call: Callable[[int], object], turn: int) -> float:
    first = turn * (SETTLE + BURST)
    for index in range(first, first + SETTLE):
        call(index)
    start = time.perf_counter()
    for index in range(first + SETTLE, first + SETTLE + BURST):
        call(index)
    return 1000 * (time.perf_counter() - start) / BURST
