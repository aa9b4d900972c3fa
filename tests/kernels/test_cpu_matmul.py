"""Native products against dequantize-then-multiply in float64."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matrices import (
    ISAS,
    KINDS,
    PLAIN,
    random_matrix,
    random_tokens,
    relative_error,
    running_on,
    running_with,
    weights_of,
)

from foregate.kernels import cpu
from foregate.quantize.matrix import BITS

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not())
FACTORS = {True: 1e-6, False: 1e-2}  # tolerated, of the product of absolute values, by exactness


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 40),
    cols=st.one_of(st.integers(1, 200), st.integers(1000, 2200)),
    tokens=st.integers(1, 70),
    exact=st.booleans(),
    seed=st.integers(0, 99),
)
@example(kind=3, rows=1, cols=1, tokens=1, exact=False, seed=0)
@example(kind=2, rows=17, cols=1025, tokens=70, exact=False, seed=0)
@example(kind=8, rows=9, cols=1088, tokens=3, exact=True, seed=0)
def test_any_shape(isa, kind, rows, cols, tokens, exact, seed):
    matrix, x = random_matrix(kind, rows, cols, seed), random_tokens(tokens, cols, seed)
    weights = weights_of(matrix)
    with running_on(isa):
        y = cpu.matmul(x, matrix, exact=exact)
        alone = torch.cat([cpu.matmul(row, matrix, exact=exact) for row in x.split(1)])
    size = (x.double().abs() @ weights.abs().T).norm()  # cancellation cannot make it small
    assert (y.double() - x.double() @ weights.T).norm() <= FACTORS[exact or kind in PLAIN] * size
    assert torch.equal(y, alone), "a token's result depends on the tokens beside it"


@pytest.mark.parametrize(("isa", "kind"), itertools.product(ISAS, KINDS))
def test_precision_on_typical_data(isa, kind):
    matrix, x = random_matrix(kind, 96, 1024), torch.randn(5, 1024, generator=torch.Generator().manual_seed(3))
    expected = x.double() @ weights_of(matrix).T
    with running_on(isa):
        assert relative_error(cpu.matmul(x, matrix, exact=True), expected) < 1e-5
        assert relative_error(cpu.matmul(x, matrix), expected) < (1e-5 if kind in PLAIN else 1e-2)


@pytest.mark.parametrize(("isa", "bits"), itertools.product(ISAS, BITS))
def test_extreme_codes_do_not_overflow(isa, bits):
    """All codes at their largest without zero points, then the reverse: integer sums at their bounds."""
    matrix = random_matrix(bits, 2, 256)
    smallest = torch.tensor([0, 255], dtype=torch.uint8)
    for name, values in (
        ("low", 255 - smallest),
        ("high", 255 - smallest),
        ("zeros", smallest),
        ("groups", smallest | 15),
    ):
        if name in matrix.planes:
            matrix.planes[name][:] = values.view(2, *[1] * (matrix.planes[name].ndim - 1))
    x = torch.full((2, 256), 3.0)
    x[1, ::2] = -3.0
    with running_on(isa):
        y = cpu.matmul(x, matrix)
    weights = weights_of(matrix)
    expected = x.double() @ weights.T
    assert (y.double() - expected).abs().max() <= 1e-5 * (x.double().abs() @ weights.abs().T).max()


@pytest.mark.parametrize(("isa", "exact"), itertools.product(ISAS, (True, False)))
def test_threads_and_order_change_nothing(isa, exact):
    x = random_tokens(9, 700)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    for kind in KINDS:
        matrix = random_matrix(kind, 333, 700)
        with running_on(isa):
            results = []
            for threads in (1, 2, 5):
                with running_with(threads):
                    results.append(cpu.matmul(x, matrix, exact=exact))
            shuffled = cpu.matmul(x[order], matrix, exact=exact)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
        assert torch.equal(results[0][order], shuffled)


@pytest.mark.parametrize("isa", ISAS)
def test_numbers_out_of_the_ordinary(isa):
    matrix = random_matrix(4, 3, 130)
    x = torch.zeros(5, 130)
    x[1, 7] = 1e-42
    x[2, 7], x[3, 129] = torch.nan, torch.inf
    x[4] = 1e30
    with running_on(isa):
        y = cpu.matmul(x, matrix)
    assert torch.equal(y[0], torch.zeros(3))
    assert y[1].abs().max() < 1e-40
    assert y[2].isnan().all()
    assert not y[3].isfinite().any()
    assert y[4].isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
def test_half_precision_numbers(isa):
    """Every float16 and bfloat16 number, subnormal ones and infinities included, is read as PyTorch reads it."""
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(-1, 1)
        with running_on(isa):
            y = cpu.matmul(torch.ones(1, 1), every)
        torch.testing.assert_close(y[0], every.float()[:, 0], rtol=0, atol=0, equal_nan=True)


def test_zero_matrix():
    matrix = random_matrix(4, 5, 70)
    matrix.planes["base"].zero_()
    assert not cpu.matmul(random_tokens(3, 70), matrix).any()


def test_no_tokens():
    assert cpu.matmul(torch.zeros(0, 70), random_matrix(4, 5, 70)).shape == (0, 5)
