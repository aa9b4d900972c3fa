"""Every quantizer: shapes, errors, extreme matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foregate.errors import ForegateError
from foregate.quantize import QUANTIZERS, quantizer
from foregate.quantize.matrix import BITS, pack_codes, plane_shapes, unpack_codes

# Of uniform weights in -1..1, round to nearest leaves at most this relative error; others stay below.
ERROR_OF_UNIFORM = {2: 0.36, 3: 0.16, 4: 0.08, 8: 0.01}
# Of a constant block it leaves half a step of the scale's grid, 1.5 %, and at 2 bits the multiplier's as well.
ERROR_OF_CONSTANT = {2: 0.05, 3: 0.02, 4: 0.02, 8: 0.02}


def relative_error(weight: torch.Tensor, matrix) -> float:
    weight = weight.double()
    return float((matrix.dequantize().double() - weight).norm() / weight.norm())


def random_matrix(seed: int, rows: int, cols: int) -> torch.Tensor:
    """Normal weights with heavy tails: rows and blocks of different sizes, as real matrices have."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator) * 0.02
    return weight * torch.randn(rows, cols, generator=generator).mul(0.5).exp()


matrices = st.builds(random_matrix, st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 200))


@settings(deadline=None, max_examples=60)
@given(matrices, st.sampled_from(BITS), st.sampled_from(sorted(QUANTIZERS)))
def test_planes_have_the_formats_shapes_and_codes_survive(weight, bits, name):
    matrix = quantizer(name).quantize(weight, bits)
    rows, cols = weight.shape
    assert {plane: (t.dtype, tuple(t.shape)) for plane, t in matrix.planes.items()} == plane_shapes(bits, rows, cols)
    assert list(matrix.planes) == list(plane_shapes(bits, rows, cols))
    codes = unpack_codes(matrix.planes, bits, cols)
    for plane, packed in pack_codes(codes, bits).items():  # padding holds code 0
        assert torch.equal(packed, matrix.planes[plane])
    assert torch.isfinite(matrix.dequantize()).all()


@settings(deadline=None, max_examples=60)
@given(matrices, st.sampled_from(BITS))
def test_refit_is_never_worse_than_rounding_to_nearest(weight, bits):
    refit, rtn = (relative_error(weight, quantizer(name).quantize(weight, bits)) for name in ("refit", "rtn"))
    assert refit <= 1.01 * rtn + 1e-6


@settings(deadline=None, max_examples=40)
@given(matrices, st.sampled_from(BITS), st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_precision_is_quantized_as_its_exact_values(weight, bits, dtype):
    half = weight.to(dtype)
    a, b = (quantizer("refit").quantize(w, bits).planes for w in (half, half.float()))
    assert all(torch.equal(a[plane], b[plane]) for plane in a)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(BITS), st.sampled_from(["rtn", "hqq", "refit"]), st.integers(-140, 120))
def test_any_power_of_two_is_quantized_alike(bits, name, exponent):
    """Squares of weights over- and underflow in float32; denormals have few digits but must not become nonsense."""
    weight = random_matrix(1, 3, 130).double().div(0.02)
    scaled = torch.ldexp(weight, torch.tensor(exponent)).float()
    error = relative_error(scaled, quantizer(name).quantize(scaled, bits))
    at_one = relative_error(weight, quantizer(name).quantize(weight.float(), bits))
    # Half-quadratic shrinkage depends on the weights' size, and a denormal base has few digits.
    slack = 1.15 if name == "hqq" else 1.001
    assert error <= slack * at_one if exponent > -100 else error < max(0.6, 2 * at_one)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_uniform_weights(name, bits):
    weight = torch.rand(16, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert relative_error(weight, quantizer(name).quantize(weight, bits)) < ERROR_OF_UNIFORM[bits]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_zeros_stay_zero(name, bits):
    assert not quantizer(name).quantize(torch.zeros(3, 100), bits).dequantize().any()
    weight = random_matrix(0, 4, 256)
    weight[1] = 0
    weight[:, 64:128] = 0
    restored = quantizer(name).quantize(weight, bits).dequantize()
    assert not restored[1].any() and not restored[:, 64:128].any()


@pytest.mark.parametrize("constant", [3.0, -0.7, 1e-4])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_constant_blocks(name, bits, constant):
    weight = torch.full((2, 70), constant)
    assert relative_error(weight, quantizer(name).quantize(weight, bits)) < ERROR_OF_CONSTANT[bits]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_an_outlier_spoils_its_own_block_alone(name, bits):
    """Blocks elsewhere may lose a little, since the scales of a matrix span a factor of 63,000."""
    clean = random_matrix(0, 8, 512)
    spoilt = clean.clone()
    spoilt[3, 100] = 1e4 * clean.abs().mean()
    restored = quantizer(name).quantize(spoilt, bits).dequantize()
    assert abs(restored[3, 100] / spoilt[3, 100] - 1) < 0.06
    others = torch.ones_like(clean, dtype=torch.bool)
    others[3] = False
    expected = quantizer(name).quantize(clean, bits).dequantize()
    error, usual = ((r - clean)[others].norm() / clean[others].norm() for r in (restored, expected))
    assert error < max(1.3 * usual, 0.3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_weights_that_are_not_finite_are_refused_by_name(name, bad):
    weight = torch.ones(4, 80)
    weight[2, 70] = bad
    with pytest.raises(ForegateError, match="layer 3, expert 17, up_proj has weights that are NaN or infinite"):
        quantizer(name).quantize(weight, 4, name="layer 3, expert 17, up_proj")


@pytest.mark.parametrize("importance", [torch.full((80,), float("nan")), -torch.ones(80)])
def test_bad_importance_is_refused(importance):
    with pytest.raises(ForegateError, match="the importance of down_proj"):
        quantizer("refit").quantize(torch.ones(4, 80), 4, importance, name="down_proj")


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="not 5"):
        quantizer("rtn").quantize(torch.ones(4, 64), 5)
    with pytest.raises(ValueError, match="not a matrix"):
        quantizer("rtn").quantize(torch.ones(64), 4)
    with pytest.raises(ValueError, match="80 columns"):
        quantizer("refit").quantize(torch.ones(4, 80), 4, torch.ones(79))
    with pytest.raises(ForegateError, match="choose one of rtn, hqq, refit, gptq"):
        quantizer("awq")


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_importance_moves_error_to_unimportant_columns(bits):
    weight = random_matrix(0, 16, 512)
    importance = torch.ones(512)
    importance[::4] = 100
    importance[1::4] = 0
    plain, weighted = (
        (quantizer("refit").quantize(weight, bits, h).dequantize() - weight).square().sum(0) for h in (None, importance)
    )
    assert weighted[::4].sum() < 0.75 * plain[::4].sum()
    same = quantizer("refit").quantize(weight, bits, torch.full((512,), 7.0)).dequantize()
    assert torch.equal(same, quantizer("refit").quantize(weight, bits).dequantize())


@pytest.mark.parametrize("bits", BITS)
def test_refit_keeps_the_norm(bits):
    """Products of quantized matrices would shrink otherwise; with an importance it is the weighted norm."""
    weight = random_matrix(0, 16, 500)
    importance = torch.rand(500, generator=torch.Generator().manual_seed(1))
    for chosen in (None, importance):
        h = torch.ones(500) if chosen is None else chosen
        restored = quantizer("refit").quantize(weight, bits, chosen).dequantize()
        assert float((h * restored**2).sum() / (h * weight**2).sum()) == pytest.approx(1, rel=1e-4)
