"""GPTQ: the error of the output on inputs that calibration did not see."""

import pytest
import torch

from foregate.errors import ForegateError
from foregate.quantize import quantizer

ROWS, COLS = 64, 256


@pytest.fixture(scope="module")
def layer() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, calibration inputs and other inputs: correlated (a power law of variances), columns of different size."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(COLS, COLS, generator=generator))[0]
    mixing = directions * torch.arange(1, COLS + 1) ** -0.5
    inputs = torch.randn(4096, COLS, generator=generator) @ mixing.T
    inputs *= torch.randn(COLS, generator=generator).mul(0.5).exp()
    return torch.randn(ROWS, COLS, generator=generator) * 0.02, inputs[:2048], inputs[2048:]


def output_error(matrix, weight: torch.Tensor, inputs: torch.Tensor) -> float:
    return float(((matrix.dequantize() - weight) @ inputs.T).norm() / (weight @ inputs.T).norm())


@pytest.mark.parametrize(("bits", "bar"), [(4, 0.85), (3, 0.85), (2, 0.75)])
def test_output_error_falls_well_below_hqq(layer, bits, bar):
    weight, seen, unseen = layer
    gptq = quantizer("gptq").quantize(weight, bits, hessian=seen.T @ seen, samples=len(seen))
    hqq = quantizer("hqq").quantize(weight, bits)
    assert output_error(gptq, weight, unseen) < bar * output_error(hqq, weight, unseen)


@pytest.mark.parametrize("samples", [1, 8, 32, 128])
def test_few_samples_do_no_harm(layer, samples):
    weight, seen, unseen = layer
    some = seen[:samples]
    gptq = quantizer("gptq").quantize(weight, 3, hessian=some.T @ some, samples=samples)
    refit = quantizer("refit").quantize(weight, 3)
    assert output_error(gptq, weight, unseen) < 1.05 * output_error(refit, weight, unseen)


def test_without_inputs_it_is_refit(layer):
    weight = layer[0]
    importance = torch.rand(COLS, generator=torch.Generator().manual_seed(0))
    for arguments in ({}, {"importance": importance}, {"hessian": torch.zeros(COLS, COLS), "samples": 0}):
        plain = {"importance": arguments["importance"]} if "importance" in arguments else {}
        a, b = quantizer("gptq").quantize(weight, 3, **arguments), quantizer("refit").quantize(weight, 3, **plain)
        assert torch.equal(a.dequantize(), b.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_ragged_matrices_and_dead_columns(bits):
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(5, 75, generator=generator), torch.randn(300, 75, generator=generator)
    inputs[:, 10:20] = 0
    matrix = quantizer("gptq").quantize(weight, bits, hessian=inputs.T @ inputs, samples=300)
    assert output_error(matrix, weight, inputs) < {2: 0.35, 3: 0.2, 4: 0.1, 8: 0.01}[bits]
    assert torch.isfinite(matrix.dequantize()).all()


def test_bad_hessians_are_refused():
    weight = torch.ones(4, 64)
    with pytest.raises(ForegateError, match="the Hessian of up_proj has values that are NaN"):
        quantizer("gptq").quantize(weight, 4, hessian=torch.full((64, 64), float("nan")), name="up_proj")
    with pytest.raises(ForegateError, match="the Hessian of up_proj is not positive semidefinite"):
        quantizer("gptq").quantize(weight, 4, hessian=torch.eye(64) - 2 * torch.ones(64, 64), name="up_proj")
    with pytest.raises(ValueError, match="64 columns"):
        quantizer("gptq").quantize(weight, 4, hessian=torch.eye(63))
