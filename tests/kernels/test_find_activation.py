"""Finding a family's activation: a clamp must be noticed however far out it lies."""

import pytest
import torch
from torch import nn

from foregate.kernels.activation import apply_activation, find_activation


class Gated(nn.Module):
    """An experts module whose gate clamps at `limit`, as DeepSeek-V4's does."""

    has_gate = True

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return nn.functional.silu(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)


@pytest.mark.parametrize("limit", [7.0, 10.0, 20.0, 1000.0])
def test_a_clamped_gate_is_not_taken_for_a_plain_one(limit: float) -> None:
    assert find_activation(Gated(limit), apply_activation) is None


def test_a_plain_gate_is_found() -> None:
    found = find_activation(Gated(float("inf")), apply_activation)
    assert found is not None
    assert (found.function, found.layout) == ("silu", "concatenated")
