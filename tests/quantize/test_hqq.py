"""HQQ against the figures of the hqq library on the same matrices.

Made with hqq 0.2.8.post1 and PyTorch 2.13 by `python tests/quantize/test_hqq.py`, which prints them anew.
"""

import pytest
import torch

from foregate.quantize import hqq, quantizer
from foregate.quantize.grid import Layout, blocks_of, codes_of

# Relative errors of the library by bits: with float32 scales and zero points, and with its usual float16 ones.
LIBRARY = {
    "normal": {4: (0.08608, 0.08608), 3: (0.18469, 0.18469), 2: (0.30319, 0.30319)},
    "heavy tails": {4: (0.13329, 0.13329), 3: (0.24876, 0.24876), 2: (0.28766, 0.28766)},
}


def matrix(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    normal, other, size = (torch.randn(256, 1024, generator=generator) for _ in range(3))
    return normal * 0.02 if kind == "normal" else other * 0.02 * size.exp()


def relative_error(restored: torch.Tensor, weight: torch.Tensor) -> float:
    return float((restored - weight).norm() / weight.norm())


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("kind", LIBRARY)
def test_the_solver_reaches_the_librarys_error(kind, bits):
    weight, layout = matrix(kind), Layout.of(bits)
    blocks = blocks_of(weight, bits)
    scale, zero = hqq.solve(blocks, 1e-12, layout.top)
    restored = (codes_of(blocks, scale, zero, layout.top) - zero.unsqueeze(-1)) * scale.unsqueeze(-1)
    assert relative_error(restored.reshape(weight.shape), weight) == pytest.approx(LIBRARY[kind][bits][0], rel=0.01)


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("kind", LIBRARY)
def test_stored_hqq_and_refit_against_the_library(kind, bits):
    weight, (_, library) = matrix(kind), LIBRARY[kind][bits]
    stored = {
        name: relative_error(quantizer(name).quantize(weight, bits).dequantize(), weight) for name in ("hqq", "refit")
    }
    assert stored["hqq"] < 1.04 * library
    assert stored["refit"] < {4: 0.97, 3: 0.96, 2: 0.95}[bits] * library


def library_error(weight: torch.Tensor, bits: int, metadata: torch.dtype) -> float:
    from hqq.core.quantize import Quantizer

    group = 16 if bits == 2 else 64
    codes, meta = Quantizer.quantize(weight, nbits=bits, group_size=group, axis=1, round_zero=False, device="cpu")
    meta |= {"compute_dtype": torch.float32} | {k: meta[k].to(metadata).float() for k in ("scale", "zero")}
    return relative_error(Quantizer.dequantize(codes, meta), weight)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_the_recorded_figures_are_the_librarys(bits):
    pytest.importorskip("hqq")
    assert library_error(matrix("normal"), bits, torch.float32) == pytest.approx(LIBRARY["normal"][bits][0], rel=1e-3)


if __name__ == "__main__":
    for name in LIBRARY:
        errors = {b: [library_error(matrix(name), b, d) for d in (torch.float32, torch.float16)] for b in (4, 3, 2)}
        print(name, {b: tuple(round(e, 5) for e in pair) for b, pair in errors.items()})
