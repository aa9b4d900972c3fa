"""The Triton kernels, under Triton's interpreter where there is no card, against the PyTorch reference on slots."""

import itertools

import pytest
import torch
from experts import Experts, random_slots
from matrices import relative_error

from foregate.errors import ForegateError
from foregate.kernels.cpu import GPT_OSS, Activation
from foregate.kernels.slots import Rows, SlotReference

triton_kernels = pytest.importorskip("foregate.kernels.triton", reason="Triton is not installed")

from foregate.kernels.triton.configs import Decode, Grouped  # noqa: E402 - only where Triton is
from foregate.kernels.triton.record import record_places  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(triton_kernels.why_not(DEVICE) is not None, reason=str(triton_kernels.why_not(DEVICE)))

BITS = (8, 4, 3, 2)
FUNCTIONS = ("silu", "gelu_tanh", "gelu", "relu2", "relu")
PLAIN = [Activation(f, layout) for layout in ("concatenated", "interleaved", "ungated") for f in FUNCTIONS]
ACTIVATIONS = [*PLAIN, GPT_OSS, Activation("gelu", limit=0.5)]
# The interpreter's time grows with the number of programs: few rows per program are for a few tests.
FAST = {Decode: (Decode(64, 2, 4), Decode(64, 1, 4)), Grouped: (Grouped(16, 64, 4, 1), Grouped(16, 32, 4, 1))}


def both(activation: Activation, bits, hidden: int, inner: int, bias=None, experts: int = 3):
    """(Triton's kernel, the reference) on the same slots."""
    layout, slots = random_slots(activation, bits, hidden, inner, bias, experts)
    module, slots = Experts(activation), slots.to(DEVICE)
    kernel = triton_kernels.TritonKernel(module, layout, slots, activation, record_places(layout))
    for kind, (up, down) in FAST.items():
        kernel.use(kind, up, down)
    return kernel, SlotReference(module, layout, slots)


def random_hidden(count: int, hidden: int, dtype: torch.dtype = torch.float32, seed: int = 2) -> torch.Tensor:
    """Tokens like those after a norm."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(count, hidden, generator=g) / 4).to(dtype).to(DEVICE)


def some_rows(tokens: int, top_k: int, experts: int, seed: int = 3) -> Rows:
    """Every token with k slots, some of them none; places shuffled."""
    g = torch.Generator().manual_seed(seed)
    count = tokens * top_k
    slots = torch.randint(-1, experts, (count,), generator=g)
    rows = (slots, torch.arange(count) // top_k, torch.randperm(count, generator=g))
    return Rows(*(part.int().to(DEVICE) for part in rows))


def result(kernel, hidden: torch.Tensor, rows: Rows, grouped: bool) -> torch.Tensor:
    outputs = torch.full((len(rows.slots), hidden.shape[1]), 7.0, device=DEVICE)
    kernel.run(hidden, rows, outputs, grouped)
    return outputs


@pytest.mark.parametrize(("bits", "grouped"), itertools.product(BITS, (False, True)))
def test_odd_sizes(bits, grouped):
    """Rows and columns that fill neither blocks of 64, nor groups of 16, nor tiles; biases; rows without a slot."""
    kernel, reference = both(GPT_OSS, bits, hidden=197, inner=75, bias=torch.bfloat16)
    hidden, rows = random_hidden(3, 197), some_rows(3, 2, 3)
    found, expected = result(kernel, hidden, rows, grouped), result(reference, hidden, rows, grouped)
    left_alone = rows.places[rows.slots < 0].long()
    assert len(left_alone) and (found[left_alone] == 7).all()
    assert relative_error(found, expected) < 2e-6
    assert "triton" in kernel.note and "PyTorch" not in kernel.note


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: f"{a.function}-{a.layout}-{a.limit}")
def test_activations(activation):
    kernel, reference = both(activation, 4, hidden=70, inner=20)
    hidden, rows = random_hidden(2, 70), some_rows(2, 1, 1)
    rows.slots.fill_(0)
    for grouped in (False, True):
        found, expected = result(kernel, hidden, rows, grouped), result(reference, hidden, rows, grouped)
        assert relative_error(found, expected) < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "activation"), itertools.product(BITS, ACTIVATIONS), ids=str)
@pytest.mark.parametrize("bias", [None, torch.float16, torch.bfloat16, torch.float32])
def test_every_combination(bits, activation, bias):
    kernel, reference = both(activation, bits, hidden=70, inner=20, bias=bias)
    hidden, rows = random_hidden(2, 70), some_rows(2, 1, 3)
    rows.slots.clamp_(min=0)
    for grouped in (False, True):
        found, expected = result(kernel, hidden, rows, grouped), result(reference, hidden, rows, grouped)
        assert relative_error(found, expected) < 5e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tokens(dtype):
    """Decode computes in float32 whatever the tokens' dtype; tiles round weights and inner values to it."""
    kernel, reference = both(Activation(), (4, 3), hidden=136, inner=70)
    hidden, rows = random_hidden(3, 136, dtype), some_rows(3, 2, 3)
    expected = result(reference, hidden, rows, False)
    assert relative_error(result(kernel, hidden, rows, False), expected) < 2e-6
    if dtype == torch.float16 or DEVICE.type == "cuda":  # the interpreter's products of bfloat16 are garbage
        assert relative_error(result(kernel, hidden, rows, True), expected) < 4 * torch.finfo(dtype).eps
    total = torch.empty(3, 136, dtype=dtype, device=DEVICE)
    slots, weights = rows.slots.view(3, 2), torch.rand(3, 2, device=DEVICE)
    kernel.decode(hidden, slots, weights, total)
    expected = torch.empty(3, 136, device=DEVICE)
    reference.decode(hidden, slots, weights, expected)
    assert relative_error(total, expected) < torch.finfo(dtype).eps


@pytest.mark.parametrize(("first", "down"), [(4, 2), (3, 8)])
def test_the_fused_sum_is_run_and_combine_bit_for_bit(first, down):
    kernel, reference = both(GPT_OSS, (first, down), hidden=66, inner=66, bias=torch.float16)
    hidden = random_hidden(2, 66)
    slots = torch.tensor([[2, 0, 1], [1, -1, 2]], dtype=torch.int32, device=DEVICE)
    weights = torch.rand(2, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    places = torch.arange(6, dtype=torch.int32, device=DEVICE)
    outputs = result(kernel, hidden, Rows(slots.view(-1), places // 3, places), False)
    outputs[slots.view(-1) < 0] = torch.nan  # what was never written must not matter
    fused, apart, expected = (torch.empty(2, 66, device=DEVICE) for _ in range(3))
    kernel.decode(hidden, slots, weights, fused)
    kernel.combine(outputs, slots, weights, apart)
    assert torch.equal(fused, apart)
    kernel.use(Decode, FAST[Decode][0], Decode(64, 1, 4, apart=True))
    kernel.decode(hidden, slots, weights, apart)
    assert torch.equal(fused, apart)
    reference.decode(hidden, slots, weights, expected)
    assert relative_error(fused, expected) < 2e-6


@pytest.mark.parametrize("grouped", [False, True])
def test_order_slots_and_company_change_nothing(grouped):
    """The same bits for a row wherever its expert lies, whatever the order, and whoever else is in the call."""
    kernel, _ = both(Activation(), 4, hidden=130, inner=40, experts=4)
    hidden, rows = random_hidden(20, 130), some_rows(20, 2, 4)
    count = 40 if grouped else 12
    rows = Rows(*(part[:count] for part in (rows.slots, rows.tokens, torch.arange(40, dtype=torch.int32).to(DEVICE))))
    expected = result(kernel, hidden, rows, grouped)

    order = torch.randperm(count, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    shuffled = Rows(rows.slots[order], rows.tokens[order], rows.places[order])
    assert torch.equal(result(kernel, hidden, shuffled, grouped), expected)

    moved = torch.tensor([2, 3, 1, 0], device=DEVICE)  # the slot where each expert lies now
    kernel.slots[moved] = kernel.slots.clone()
    there = torch.where(rows.slots < 0, -1, moved[rows.slots.clamp(min=0).long()]).int()
    assert torch.equal(result(kernel, hidden, Rows(there, rows.tokens, rows.places), grouped), expected)

    alone = torch.full_like(expected, 7.0)
    for row in range(0, count, 5):
        kernel.run(
            hidden, Rows(there[row : row + 1], rows.tokens[row : row + 1], rows.places[row : row + 1]), alone, grouped
        )
        assert torch.equal(alone[row], expected[row])


def test_many_tiles_of_one_expert():
    kernel, reference = both(Activation(), 2, hidden=64, inner=48, experts=2)
    hidden, count = random_hidden(50, 64), 50
    slots = torch.tensor([0] * 37 + [1] * 5 + [-1] * 3 + [-2] * 5, dtype=torch.int32, device=DEVICE)
    places = torch.arange(count, dtype=torch.int32, device=DEVICE)
    rows = Rows(slots, places.flip(0), places)
    found, expected = result(kernel, hidden, rows, True), result(reference, hidden, rows, True)
    assert relative_error(found, expected) < 2e-6


@pytest.mark.parametrize(("rows", "wide"), [(4, 2), (16, 4), (8, 16)])
def test_configurations_differ_in_rounding_only(rows, wide):
    kernel, reference = both(Activation("relu2", "ungated"), 3, hidden=200, inner=18, experts=1)
    kernel.use(Decode, Decode(rows, wide, 1), Decode(rows, wide, 1))
    hidden, one = random_hidden(1, 200), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    found, expected = (result(k, hidden, Rows(one, one, one), False) for k in (kernel, reference))
    assert relative_error(found, expected) < 2e-6


@pytest.mark.filterwarnings("ignore:invalid value")
def test_tokens_out_of_the_ordinary():
    kernel, _ = both(Activation("relu", "ungated"), 4, hidden=64, inner=16, experts=1)
    hidden = torch.zeros(5, 64, device=DEVICE)
    hidden[1], hidden[2, 7], hidden[3, 63], hidden[4] = 1e10, torch.nan, torch.inf, 1e-15
    index = torch.arange(5, dtype=torch.int32, device=DEVICE)
    found = result(kernel, hidden, Rows(torch.zeros_like(index), index, index), False)
    assert not found[0].any()
    assert found[1].isfinite().all() and found[1].any()
    assert found[2].isnan().all()
    assert not found[3].isfinite().any()
    assert torch.allclose(found[4] * 1e25, found[1], rtol=1e-5)


def test_no_rows():
    kernel, _ = both(Activation(), 4, hidden=64, inner=16)
    none = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    for grouped in (False, True):
        assert result(kernel, random_hidden(2, 64), Rows(none, none, none), grouped).shape == (0, 64)
    nothing = torch.zeros(0, 64, device=DEVICE)
    kernel.decode(nothing, none.view(0, 2), nothing.view(0, 2), nothing)


def test_tensors_elsewhere_are_refused():
    kernel, _ = both(Activation(), 4, hidden=64, inner=16)
    rows = some_rows(2, 1, 1)
    with pytest.raises(ForegateError, match="contiguous"):
        kernel.run(random_hidden(64, 2).T, rows, torch.zeros(2, 64, device=DEVICE), False)
    with pytest.raises(ForegateError, match="not on meta"):
        kernel.run(random_hidden(2, 64), rows, torch.zeros(2, 64, device="meta"), False)
