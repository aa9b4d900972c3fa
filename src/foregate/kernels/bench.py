"""Timing the native kernels beside what PyTorch offers, in one interleaved run, against this machine's memory bandwidth.

A product with one token reads its weights once: bytes over bandwidth is the floor. Records lie in slots as the engine
has them, everything else in memory of the same kind, and several take turns so that no cache holds them between two
calls.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from foregate.checkpoint.store import RecordLayout, Weight
from foregate.errors import ForegateError
from foregate.kernels import cpu
from foregate.memory.pages import allocate
from foregate.memory.slots import SlotMemory
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
class Case:
    """What is timed: a call with the number of its turn, on so many tokens, that reads so many bytes of weights."""

    name: str
    tokens: int
    nbytes: int
    call: Callable[[int], object]


@dataclass(frozen=True)
class Timing:
    """One row of the benchmark; times in milliseconds, of one call."""

    name: str
    tokens: int
    nbytes: int  # of weights and metadata read
    median: float
    fastest: float
    slowest: float

    @property
    def gigabytes_per_second(self) -> float:
        return self.nbytes / self.median / 1e6


def bench_kernels(shape: str, bits: list[int], tokens: list[int], repeats: int = 15) -> tuple[float, list[Timing]]:
    """(bandwidth of a plain parallel read in GB/s, timings): native kernels and PyTorch's, interleaved.

    Raises ForegateError for an unknown shape, or when the native kernels cannot run here.
    """
    if shape not in SHAPES:
        raise ForegateError(f"unknown shape {shape}: choose one of {', '.join(SHAPES)}")
    if not cpu.available():
        raise ForegateError(f"there are no native kernels to time: {cpu.why_not()}")
    rows, cols = SHAPES[shape]
    cases = [case for width in bits for case in _native_cases(width, rows, cols, tokens)]
    cases += _torch_cases(rows, cols, tokens)
    bandwidth, times = _measure(cases, repeats)
    timings = [
        Timing(case.name, case.tokens, case.nbytes, statistics.median(taken), min(taken), max(taken))
        for case, taken in zip(cases, times, strict=True)
    ]
    return bandwidth, timings


def _native_cases(bits: int, rows: int, cols: int, tokens: list[int]) -> list[Case]:
    """Products with a matrix, and a whole expert beside its products alone."""
    matrices = [record["matrix"] for record in _in_slots({"matrix": _random_matrix(bits, rows, cols)})]
    expert = {"up": _random_matrix(bits, 2 * rows, cols), "down": _random_matrix(bits, cols, rows)}
    experts = [cpu.Expert(**record) for record in _in_slots(expert)]
    one, whole = _plane_bytes(matrices[0]), sum(map(_plane_bytes, expert.values()))
    cases = []
    for count in tokens:
        x, inner = torch.randn(count, cols), torch.randn(count, rows)
        for exact, mode in ((False, "int8"), (True, "exact")):
            products = [(cpu.Product(matrix, exact), x) for matrix in matrices]
            cases.append(Case(f"{bits}-bit {mode}", count, one, _in_turn(products, lambda p: p[0](p[1]))))
        activation = cpu.Activation()
        call = _in_turn(experts, lambda e, x=x, a=activation: cpu.expert_mlp(x, e, a))
        cases.append(Case(f"expert, {bits}-bit int8", count, whole, call))
        parts = [(cpu.Product(e.up), x, cpu.Product(e.down), inner) for e in experts]
        call = _in_turn(parts, lambda p: (p[0](p[1]), p[2](p[3])))
        cases.append(Case(f"its products, {bits}-bit int8", count, whole, call))
    return cases


def _torch_cases(rows: int, cols: int, tokens: list[int]) -> list[Case]:
    plain = [_placed(torch.randn(rows, cols)) for _ in range(_turns(rows * cols * 4))]
    packed = _torch_int4(rows, cols)
    cases = []
    for count in tokens:
        x = torch.randn(count, cols)
        call = _in_turn(plain, lambda w, x=x: functional.linear(x, w))
        cases.append(Case("torch fp32 linear", count, plain[0].nbytes, call))
        half = x.bfloat16()
        call = _in_turn(packed, lambda w, x=half: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w[0], 64, w[1]))
        cases.append(Case("torch int4pack bf16", count, sum(part.nbytes for part in packed[0]), call))
    return cases


def _torch_int4(rows: int, cols: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    codes = torch.randint(0, 16, (rows, cols), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(cols // 64, rows, 2).to(torch.bfloat16)
    return [(_placed(packed), _placed(scales)) for _ in range(_turns(packed.nbytes))]


def _random_matrix(bits: int, rows: int, cols: int) -> QuantizedMatrix:
    def plane(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.ones(shape) if dtype.is_floating_point else torch.randint(0, 256, shape, dtype=dtype)

    planes = {name: plane(dtype, shape) for name, (dtype, shape) in plane_shapes(bits, rows, cols).items()}
    return QuantizedMatrix(bits, rows, cols, planes)


def _in_slots(params: dict[str, Weight]) -> list[dict[str, Weight]]:
    """The parameters as records in slots, enough of them to take turns."""
    layout = RecordLayout.of(params)
    record = layout.pack(params)
    memory = SlotMemory(_turns(layout.nbytes), layout.nbytes)
    for slot in range(memory.slots):
        memory.buffer(slot, layout.nbytes)[:] = record
    return [layout.unpack(memory.record(slot, layout.nbytes)) for slot in range(memory.slots)]


def _placed(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in memory of the slots' kind."""
    return torch.frombuffer(allocate(tensor.nbytes), dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


def _plane_bytes(matrix: QuantizedMatrix) -> int:
    return sum(plane.nbytes for plane in matrix.planes.values())


def _turns(nbytes: int) -> int:
    return max(2, -(-TURNS_BYTES // nbytes))


def _in_turn(items: list, call: Callable) -> Callable[[int], object]:
    return lambda turn: call(items[turn % len(items)])


def _measure(cases: list[Case], repeats: int) -> tuple[float, list[list[float]]]:
    """A burst of every case per round, after a round to warm up.

    Returns the bandwidth of a plain read in GB/s, and for every case milliseconds a call.
    """
    block = _placed(torch.ones(READ_BYTES // 4))
    reads, times = [], [[] for _ in cases]
    for turn in range(repeats + 1):
        reads.append(_milliseconds(lambda turn: block.sum(), turn))
        for case, taken in zip(cases, times, strict=True):
            taken.append(_milliseconds(case.call, turn))
    return READ_BYTES / statistics.median(reads[1:]) / 1e6, [taken[1:] for taken in times]


def _milliseconds(call: Callable[[int], object], turn: int) -> float:
    first = turn * (SETTLE + BURST)
    for index in range(first, first + SETTLE):
        call(index)
    start = time.perf_counter()
    for index in range(first + SETTLE, first + SETTLE + BURST):
        call(index)
    return 1000 * (time.perf_counter() - start) / BURST
