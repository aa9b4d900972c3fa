"""Widening against torch's own repetition, and the shares."""

import math

import pytest
import torch

from foregate.checkpoint import widen as module
from foregate.checkpoint.widen import Axes, Axis, shares, wide_pieces, wide_shape, widen

CASES: list[tuple[tuple[int, ...], Axes]] = [
    ((6,), (Axis(6, 3, False),)),
    ((6,), (Axis(6, 3, True),)),
    ((6,), (None,)),
    ((4, 6), (None, Axis(6, 5, True))),
    ((4, 6), (Axis(2, 3, False), Axis(3, 2, False))),  # two runs each: gate and up fused
    ((2, 4, 6), (None, Axis(2, 3, False), Axis(6, 5, True))),  # all experts in one tensor
]


def repeated(tensor: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
    """The obvious way: run by run, copy by copy."""
    factors = shares(axis.copies) if axis.shared else [1.0] * axis.copies
    return torch.cat([run * factor for run in tensor.split(axis.unit, dim) for factor in factors], dim)


@pytest.mark.parametrize("copies", range(1, 130))
def test_shares_are_powers_of_two_that_add_up_to_one(copies: int) -> None:
    found = shares(copies)
    assert len(found) == copies
    assert math.fsum(found) == 1.0
    assert all(math.frexp(share)[0] == 0.5 for share in found)
    assert max(found) <= 2 * min(found)


@pytest.mark.parametrize(("shape", "axes"), CASES)
@pytest.mark.parametrize("piece_bytes", [1, 50, 1 << 20])
def test_pieces_make_the_widened_tensor(
    shape: tuple[int, ...], axes: Axes, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", piece_bytes)
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = tensor
    for dim, axis in enumerate(axes):
        expected = repeated(expected, dim, axis) if axis else expected
    assert expected.shape == wide_shape(shape, axes)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(widen(tensor, axes), expected)
    assert torch.equal(torch.cat(list(wide_pieces(tensor, axes))), expected)
