"""Dividing memory: what the user grants becomes a number of slots."""

import re
from dataclasses import dataclass

from foregate.checkpoint.store import Store
from foregate.errors import ForegateError
from foregate.sizes import parse_bytes

SHARE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%")


@dataclass(frozen=True)
class Budget:
    """Where the memory goes, in bytes."""

    slots: int
    slot_bytes: int
    backbone_bytes: int  # as loaded, in the compute dtype

    @property
    def total_bytes(self) -> int:
        return self.backbone_bytes + self.slots * self.slot_bytes


def divide(memory: str, store: Store, backbone_bytes: int) -> Budget:
    """Turn `memory` into slots for the experts of `store`; see `count_slots`, whose errors it raises."""
    slots = count_slots(memory, store.num_experts, store.top_k, store.record_bytes, backbone_bytes)
    return Budget(slots, store.record_bytes, backbone_bytes)


def count_slots(memory: str, experts: int, top_k: int, record_bytes: int, backbone_bytes: int = 0) -> int:
    """The slots that `memory` has room for, out of `experts` over all layers.

    `memory` is a share of the experts ("25%"), or bytes ("8GiB") for backbone and experts together; the KV cache and
    activations come on top. More than everything is everything. Raises ForegateError when the text is not a memory
    size, or is too small for the experts that one token uses in one layer.
    """
    text = memory.strip()
    if share := SHARE.fullmatch(text):
        percent = float(share[1])
        if not 0 < percent <= 100:
            raise ForegateError(f"--memory {memory}: a share of the experts is above 0% and at most 100%")
        slots = int(experts * percent / 100 + 1e-9)
        smallest = f"{-(-top_k * 10_000 // experts) / 100:g}%"
    else:
        granted = parse_bytes(text, "--memory", "a share such as 25% or bytes such as 8GiB")
        slots = (granted - backbone_bytes) // record_bytes
        smallest = f"{backbone_bytes + top_k * record_bytes}"
    if slots < top_k:
        raise ForegateError(
            f"--memory {memory} is too small: one layer needs {top_k} of the model's {experts} experts at a time; "
            f"the smallest that works is --memory {smallest}"
        )
    return min(slots, experts)
