"""The native kernels on slots against the PyTorch reference on slots."""

import pytest
import torch
from experts import Experts, random_slots
from matrices import relative_error

from foregate.kernels import cpu
from foregate.kernels.cpu import GPT_OSS, Activation
from foregate.kernels.slots import Rows, SlotNative, SlotReference, choose_slot_kernel

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not())

TOKENS, TOP_K, SLOTS = 7, 3, 5


@pytest.mark.parametrize("bits", [torch.bfloat16, 4, 3, 2])
@pytest.mark.parametrize("activation", [Activation(), GPT_OSS, Activation("relu2", "ungated")], ids=str)
def test_rows_and_sums_are_the_references(bits: int | torch.dtype, activation: Activation) -> None:
    layout, slots = random_slots(activation, bits, 128, 64, torch.float32, SLOTS)
    native, reference = (choose_slot_kernel(name, Experts(activation), layout, slots) for name in ("auto", "reference"))
    assert isinstance(native, SlotNative)
    assert isinstance(reference, SlotReference)
    g = torch.Generator().manual_seed(4)
    hidden, weights = torch.randn(TOKENS, 128, generator=g) / 4, torch.rand(TOKENS, TOP_K, generator=g)
    chosen = torch.randint(-1, SLOTS, (TOKENS, TOP_K), generator=g).int()
    places = torch.randperm(chosen.numel(), generator=g).int()
    rows = Rows(chosen.view(-1)[places.long()], places // TOP_K, places)
    found = []
    for kernel in (native, reference):
        outputs, total = torch.full((chosen.numel(), 128), 7.0), torch.empty_like(hidden)
        kernel.run(hidden, rows, outputs, grouped=False)
        kernel.combine(outputs, chosen, weights, total)
        found.append((outputs, total))
        together = torch.empty_like(hidden)
        kernel.decode(hidden, chosen, weights, together)
        assert torch.equal(together, total)
    for own, expected in zip(*found, strict=True):
        assert relative_error(own, expected) < 1e-5
    assert (found[0][0].view(TOKENS, TOP_K, -1)[chosen < 0] == 7).all(), "rows without a slot are left alone"


def test_a_slot_whose_record_was_replaced_is_computed_from_the_new_one() -> None:
    layout, slots = random_slots(Activation(), 4, 128, 64, experts=2)
    kernel = SlotNative(Experts(Activation()), layout, slots)
    hidden, rows = torch.randn(1, 128), torch.zeros(1, dtype=torch.int32)
    first, second = (torch.empty(1, 128) for _ in range(2))
    kernel.run(hidden, Rows(rows + 1, rows, rows), second, grouped=False)
    kernel.run(hidden, Rows(rows, rows, rows), first, grouped=False)
    assert not torch.equal(first, second)
    slots[0] = slots[1]
    kernel.run(hidden, Rows(rows, rows, rows), first, grouped=False)
    assert torch.equal(first, second)
