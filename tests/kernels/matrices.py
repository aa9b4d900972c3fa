"""Random matrices for kernel tests, and instruction sets to run them on."""

import contextlib
from collections.abc import Iterator

import torch

from foregate.kernels import cpu
from foregate.quantize.matrix import BITS, QuantizedMatrix, pack_codes, plane_shapes

ISAS = cpu.isas() if cpu.available() else []
PLAIN = (torch.bfloat16, torch.float16, torch.float32)
KINDS = (*BITS, *PLAIN)


@contextlib.contextmanager
def running_on(isa: str) -> Iterator[None]:
    """Run kernels on this instruction set for a while."""
    before = cpu.isa()
    cpu.use_isa(isa)
    try:
        yield
    finally:
        cpu.use_isa(before)


@contextlib.contextmanager
def running_with(threads: int) -> Iterator[None]:
    """Run kernels with so many threads for a while."""
    before = cpu.threads()
    cpu.set_threads(threads)
    try:
        yield
    finally:
        cpu.set_threads(before)


def random_matrix(kind: int | torch.dtype, rows: int, cols: int, seed: int = 0) -> cpu.Matrix:
    """A matrix with planes of random bytes (codes past the last column zero), or plain normal numbers."""
    g = torch.Generator().manual_seed(seed)
    if isinstance(kind, torch.dtype):
        return torch.randn(rows, cols, generator=g).to(kind)
    planes = {
        name: torch.randint(0, 256, shape, dtype=dtype, generator=g)
        for name, (dtype, shape) in plane_shapes(kind, rows, cols).items()
        if name != "base"
    }
    codes = torch.randint(0, 2**kind, (rows, cols), dtype=torch.uint8, generator=g)
    base = torch.rand(1, generator=g) / cols**0.5 + 0.01
    return QuantizedMatrix(kind, rows, cols, {"base": base, **planes, **pack_codes(codes, kind)})


def weights_of(matrix: cpu.Matrix) -> torch.Tensor:
    """What the matrix means, float64 [rows, cols]."""
    return (matrix.dequantize() if isinstance(matrix, QuantizedMatrix) else matrix).double()


def random_tokens(count: int, cols: int, seed: int = 1) -> torch.Tensor:
    """float32 [count, cols], rows and columns of different sizes."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, cols, generator=g) * torch.rand(count, 1, generator=g).mul(4).exp()


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """|result - expected| / |expected| by norms."""
    return ((result.double() - expected).norm() / expected.norm()).item()
