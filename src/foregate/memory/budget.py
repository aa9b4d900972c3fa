"""Dividing memory: what the user grants becomes slots, and a number of records kept in the host's memory."""

import re
from dataclasses import dataclass

from foregate.checkpoint.store import Contents
from foregate.errors import ForegateError
from foregate.memory.needs import Needs
from foregate.sizes import MIB, format_bytes, parse_bytes, whole_mib

SHARE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%")
EXPECTED = "a share such as 25% or bytes such as 8GiB"


@dataclass(frozen=True)
class HostBudget:
    """The host's memory beside a device: records that wait there, so that they need not come from the disk."""

    records: int
    record_bytes: int
    needs: Needs

    @property
    def total_bytes(self) -> int:
        return self.needs.total + self.records * self.record_bytes


@dataclass(frozen=True)
class Budget:
    """Where the memory goes, in bytes."""

    slots: int
    slot_bytes: int
    experts: int  # of the model, over all layers
    needs: Needs  # in the memory that the slots lie in
    host: HostBudget | None = None  # None: that memory is the host's

    @property
    def backbone_bytes(self) -> int:
        return self.needs.backbone

    @property
    def slots_bytes(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def total_bytes(self) -> int:
        """What the process will hold at most, the moment of loading included."""
        return max(self.needs.total + self.slots_bytes, self.needs.peak_loading)


def divide(memory: str, contents: Contents, needs: Needs, *, free: int | None = None) -> Budget:
    """Turn `memory` into slots for the experts of a store that needs `needs` beside them.

    memory: a share of the experts ("25%"), or bytes ("8GiB") for all that the process holds. More than everything is
    everything. free: bytes there are; None if nobody knows. Raises ForegateError, naming what would work, when the text
    is not a memory size, too small for the experts that one token uses in one layer, or more than there is.
    """
    slots = count_slots(memory, contents.num_experts, contents.top_k, contents.record_bytes, needs)
    budget = Budget(slots, contents.record_bytes, contents.num_experts, needs)
    if free is not None and budget.total_bytes > free:
        raise ForegateError(_too_much(memory, contents, budget, free))
    return budget


def divide_host(
    memory: str | int | None, contents: Contents, needs: Needs, *, least: int = 1, free: int | None = None
) -> HostBudget:
    """The records that the host keeps for a device. memory: a share of the experts, or bytes for records alone; None is as
    many as there is room for, or all. least: records that must fit. needs: what the process holds beside them.

    Raises ForegateError for what is no memory size, too small, or more than there is.
    """
    size, most = contents.record_bytes, contents.num_experts
    room = most if free is None else min(most, max(free - needs.total, 0) // size)
    option = "--host-memory"
    if memory is None:
        records = room
    elif share := _share(str(memory), option):
        records = int(most * share + 1e-9)
    else:
        records = min(parse_bytes(str(memory), option, EXPECTED) // size, most)
    if records < min(least, most):
        raise ForegateError(
            f"{'the free host memory' if memory is None else f'{option} {memory}'} is too small: {least} experts of {format_bytes(size)} need room, "
            f"one for each thread that loads; the smallest that works is {option} {least * size}"
        )
    if records > room:
        raise ForegateError(
            f"{option} {memory}: {format_bytes(records * size)} beside {format_bytes(needs.total)} of the process itself, "
            f"and only {format_bytes(free or 0)} of host memory are free; the largest that works is {option} "
            f"{room * size // MIB}MiB"
        )
    return HostBudget(records, size, needs)


def count_slots(memory: str, experts: int, top_k: int, record_bytes: int, needs: Needs | None = None) -> int:
    """The slots that `memory` has room for, out of `experts` over all layers; see `divide`.

    Without `needs` bytes are for experts alone.
    """
    if share := _share(memory, "--memory"):
        slots = int(experts * share + 1e-9)
        smallest, rest = f"{-(-top_k * 10_000 // experts) / 100:g}%", ""
    else:
        granted = parse_bytes(memory, "--memory", EXPECTED)
        beside, loading = (needs.total, needs.peak_loading) if needs else (0, 0)
        slots = (granted - beside) // record_bytes if granted >= loading else 0
        least = max(beside + top_k * record_bytes, loading)
        smallest = whole_mib(least) if needs else str(least)
        rest = f" beside {needs.describe()}" if needs else ""
    if slots < top_k:
        raise ForegateError(
            f"--memory {memory} is too small: one layer needs {top_k} of the model's {experts} experts at a time, "
            f"{format_bytes(top_k * record_bytes)}{rest}; the smallest that works is --memory {smallest}"
        )
    return min(slots, experts)


def _share(memory: str, option: str) -> float | None:
    """The share of the experts that `memory` names; None if it is not one."""
    match = SHARE.fullmatch(memory.strip())
    if match is None:
        return None
    if not 0 < float(match[1]) <= 100:
        raise ForegateError(f"{option} {memory}: a share of the experts is above 0% and at most 100%")
    return float(match[1]) / 100


def _too_much(memory: str, contents: Contents, budget: Budget, free: int) -> str:
    needs = budget.needs
    slots = (free - needs.total) // contents.record_bytes
    what = f"--memory {memory} takes {format_bytes(budget.total_bytes)} and only {format_bytes(free)} are free"
    if slots < contents.top_k or needs.peak_loading > free:
        return f"{what}, too little for this model ({needs.describe()}): take a shorter --context or fewer bits"
    share = f"{-(-10_000 * slots // contents.num_experts) / 100:g}%"
    largest = share if _share(memory, "--memory") else f"{free // MIB}MiB"
    return f"{what} ({needs.describe()}): the largest that works is --memory {largest}"
