"""The reference for kernels on slots: PyTorch, obvious, on any device."""

import torch
from torch import nn

from foregate.checkpoint.store import RecordLayout
from foregate.kernels.base import Work
from foregate.kernels.reference import ReferenceKernel
from foregate.kernels.slots.base import Rows, SlotKernel


class SlotReference(SlotKernel):
    """Dequantizes one expert after the other and multiplies in float32, grouped or not. It waits for the device."""

    name = "reference"

    def __init__(
        self, experts: nn.Module, layout: RecordLayout, slots: torch.Tensor, why: str = "as asked for"
    ) -> None:
        super().__init__(experts, layout, slots)
        self._why = why
        self._kernel = ReferenceKernel(experts, exact=True)

    @property
    def note(self) -> str:
        return f"PyTorch, slow: {self._why}"

    def run(self, hidden: torch.Tensor, rows: Rows, outputs: torch.Tensor, grouped: bool) -> None:
        work = []
        for slot in rows.slots.unique().tolist():
            if slot >= 0:
                chosen = (rows.slots == slot).nonzero().view(-1)
                expert = self.layout.unpack(self.slots[slot, : self.layout.nbytes])
                work.append(Work(expert, rows.tokens[chosen].long(), rows.places[chosen].long()))
        self._kernel.run(hidden.float(), work, outputs)

    def combine(self, outputs: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, total: torch.Tensor) -> None:
        weighted_sum(outputs, slots, weights, total)


def weighted_sum(outputs: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, total: torch.Tensor) -> None:
    """`SlotKernel.combine` in PyTorch, on any device."""
    places = outputs.view(*slots.shape, -1)
    sums = torch.zeros_like(places[:, 0])
    for rank in range(slots.shape[1]):
        weighted = weights[:, rank, None] * places[:, rank]
        sums += torch.where(slots[:, rank, None] >= 0, weighted, 0)
    total.copy_(sums)
