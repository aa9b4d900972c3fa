"""The slot cache's memory: one page-aligned block, cut into equal slots that direct reads fill in place."""

import torch

from foregate.memory.pages import allocate


class SlotMemory:
    """`slots` x `slot_bytes` of anonymous memory. Pages become resident when a record is first read into them."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.slots, self.slot_bytes = slots, slot_bytes
        self._view = allocate(slots * slot_bytes)
        self.tensor = torch.frombuffer(self._view, dtype=torch.uint8).view(slots, slot_bytes)

    def buffer(self, slot: int, nbytes: int) -> memoryview:
        """The first `nbytes` of a slot, writable, for reads."""
        start = slot * self.slot_bytes
        return self._view[start : start + nbytes]

    def record(self, slot: int, nbytes: int) -> torch.Tensor:
        """The first `nbytes` of a slot as uint8 [nbytes], sharing memory."""
        return self.tensor[slot, :nbytes]
