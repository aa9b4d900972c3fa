"""The native CPU kernels on slots: for a device whose memory is the host's."""

import torch
from torch import nn

from foregate.checkpoint.store import RecordLayout
from foregate.kernels import cpu
from foregate.kernels.base import Work
from foregate.kernels.native import NativeKernel
from foregate.kernels.slots.base import Rows, SlotKernel
from foregate.kernels.slots.reference import weighted_sum


class SlotNative(SlotKernel):
    """Groups rows by slot and has the native kernel compute them, with activations in float32, grouped or not."""

    name = "cpu"

    def __init__(self, experts: nn.Module, layout: RecordLayout, slots: torch.Tensor) -> None:
        super().__init__(experts, layout, slots)
        self._kernel = NativeKernel(experts, exact=True)
        self._prepared: dict[int, object] = {}  # slot -> the slot as the kernel takes it, whatever record it holds

    @property
    def note(self) -> str:
        return f"native, {cpu.isa()}"

    def run(self, hidden: torch.Tensor, rows: Rows, outputs: torch.Tensor, grouped: bool) -> None:
        order = rows.slots.argsort(stable=True)
        slots, counts = rows.slots[order].unique_consecutive(return_counts=True)
        parts = zip(slots.tolist(), order.split(counts.tolist()), strict=True)
        work = [
            Work(self._expert(slot), rows.tokens[part].long(), rows.places[part].long())
            for slot, part in parts
            if slot >= 0
        ]
        self._kernel.run(hidden.float(), work, outputs)

    def combine(self, outputs: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, total: torch.Tensor) -> None:
        weighted_sum(outputs, slots, weights, total)

    def _expert(self, slot: int) -> object:
        if slot not in self._prepared:
            self._prepared[slot] = self._kernel.prepare(self.layout.unpack(self.slots[slot, : self.layout.nbytes]))
        return self._prepared[slot]
