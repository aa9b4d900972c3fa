"""Random experts in slots, for the tests of kernels on slots."""

import torch
from matrices import random_matrix
from torch import nn

from foregate.checkpoint.store import RecordLayout, Weight
from foregate.kernels.activation import apply_activation
from foregate.kernels.cpu import Activation


class Experts(nn.Module):
    """What a kernel asks of a family's experts module: how gate and up combine."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation, self.has_gate = activation, activation.layout != "ungated"

    def _apply_gate(self, first: torch.Tensor) -> torch.Tensor:
        return apply_activation(self.activation, first)

    def act_fn(self, first: torch.Tensor) -> torch.Tensor:
        return apply_activation(self.activation, first)


def random_slots(
    activation: Activation,
    bits: int | torch.dtype | tuple[int, int],
    hidden: int,
    inner: int,
    bias: torch.dtype | None = None,
    experts: int = 3,
    seed: int = 0,
) -> tuple[RecordLayout, torch.Tensor]:
    """(layout of the records, uint8 [experts, slot_bytes]): random experts, slots a little larger than records.

    bits: of both matrices, or of the first and the down matrix.
    """
    records, layout = [], None
    for expert in range(experts):
        weights = random_weights(activation, bits, hidden, inner, bias, 100 * seed + 2 * expert)
        layout = RecordLayout.of(weights)
        records.append(torch.frombuffer(layout.pack(weights), dtype=torch.uint8))
    slots = torch.full((experts, layout.nbytes + 4096), 255, dtype=torch.uint8)  # as float16 or float32 this is NaN
    slots[:, : layout.nbytes] = torch.stack(records)
    return layout, slots


def random_weights(
    activation: Activation,
    bits: int | torch.dtype | tuple[int, int],
    hidden: int,
    inner: int,
    bias: torch.dtype | None,
    seed: int,
) -> dict[str, Weight]:
    """An expert's parameters."""
    first_bits, down_bits = (bits, bits) if not isinstance(bits, tuple) else bits
    gated = activation.layout != "ungated"
    name, rows = ("gate_up_proj", 2 * inner) if gated else ("up_proj", inner)
    first, down = random_matrix(first_bits, rows, hidden, seed), random_matrix(down_bits, hidden, inner, seed + 1)
    weights: dict[str, Weight] = {name: first, "down_proj": down}
    if bias is not None:
        g = torch.Generator().manual_seed(seed)
        weights[f"{name}_bias"] = torch.randn(rows, generator=g).to(bias)
        weights["down_proj_bias"] = torch.randn(hidden, generator=g).to(bias)
    return weights
