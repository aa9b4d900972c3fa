"""The native quantizers against the PyTorch ones, which say what they should compute."""

import pytest
import torch

from foregate.kernels import cpu
from foregate.quantize import native, quantizer
from foregate.quantize.base import prepare
from foregate.quantize.grid import greatest_scale
from foregate.quantize.matrix import BITS, QuantizedMatrix

needs_native = pytest.mark.skipif(not cpu.available(), reason="installed without native kernels")


def weights(rows: int, cols: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * cols)
    weight = torch.randn(rows, cols, generator=generator) * torch.rand(rows, 1, generator=generator)
    weight[rows // 2, : cols // 2] = 0
    return weight


@needs_native
@pytest.mark.parametrize("shape", [(1, 1), (1, 15), (3, 64), (7, 100), (16, 1000)])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["rtn", "hqq", "refit"])
@pytest.mark.parametrize("weighted", [False, True])
def test_native_agrees_with_the_reference(name, bits, shape, weighted):
    """Sums are rounded in another order, so that a tie may fall the other way: rarely, and to the same error."""
    weight = weights(*shape)
    importance = torch.rand(shape[1], generator=torch.Generator().manual_seed(1)) if weighted else None
    method = quantizer(name)
    found = method.quantize(weight, bits, importance)
    problem = prepare(weight, bits, importance if method.uses_inputs else None, "test")
    reference = method.reference(problem, greatest_scale(problem.weight, bits))
    expected = QuantizedMatrix(bits, *shape, reference.keep_norm() if method.keeps_norm else reference.planes)
    assert float(found.planes["base"]) == pytest.approx(float(expected.planes["base"]), rel=1e-4)
    restored = expected.dequantize()
    # Stored values differ by a step of the scale or more, or by rounding alone.
    different = ((found.dequantize() - restored).abs() > 1e-3 * restored.abs()).float().mean()
    assert different <= (0.25 if name == "hqq" else 0.02)
    h = 1 if problem.importance is None else problem.importance
    a, b = (float((h * (w - weight) ** 2).sum()) for w in (found.dequantize(), restored))
    assert a == pytest.approx(b, rel=0.02, abs=1e-12)


@needs_native
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["rtn", "hqq", "refit"])
def test_threads_do_not_change_a_byte(name, bits):
    weight, before = weights(67, 1000), cpu.threads()
    made = []
    try:
        for threads in (1, 2, 5):
            cpu.set_threads(threads)
            made.append(quantizer(name).quantize(weight, bits).planes)
    finally:
        cpu.set_threads(before)
    assert all(torch.equal(made[0][plane], other[plane]) for other in made[1:] for plane in other)


def test_without_the_library_pytorch_quantizes_and_says_so(monkeypatch):
    monkeypatch.setattr(cpu, "why_not", lambda: "no compiler was found")
    native.load_library.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="with PyTorch: no compiler was found"):
            matrix = quantizer("refit").quantize(weights(4, 130), 3)
    finally:
        native.load_library.cache_clear()
    assert (matrix.dequantize() - weights(4, 130)).norm() < 0.2 * weights(4, 130).norm()
