"""The scheduler's contract: a state machine that decides which expert lies in which slot. Events in, actions out.

Nothing here knows of torch, threads, clocks or files. The engine feeds it what happens and carries out what it answers:

    routed(layer, experts)  the router chose these experts; every one of them must be served
    arrived(key)            a load has finished: the record is resident
    computed(key)           the engine has used the record for this layer and may lose it

Each answers with actions in the order to carry them out. Rules that hold at all times (`check_integrity`): a record
is in at most one slot and a slot holds at most one record; a record that the layer at work still needs is never
evicted; every routed expert is served in the end, whatever the number of slots (one is enough).
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

ExpertKey = tuple[int, int]  # (MoE layer, expert)


@dataclass(frozen=True)
class Load:
    """Fill `slot` with the record `key`; answered by `arrived(key)`."""

    key: ExpertKey
    slot: int
    demand: bool = True  # needed now; otherwise a prefetch
    back: ExpertKey | None = None  # a record that must go over the link first


class Scheduler(ABC):
    """Slots, residency and the queue of demand loads; a policy says what to evict.

    A policy implements `victim` and is told of every use by `used` and of every loss by `evicted`.
    """

    def __init__(self, slots: int) -> None:
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        self.slots = slots
        self._slot_of: dict[ExpertKey, int] = {}  # resident and loading records
        self._free = list(range(slots - 1, -1, -1))
        self._loading: set[ExpertKey] = set()
        self._needed: set[ExpertKey] = set()  # routed and not yet computed: never evicted
        self._queue: deque[ExpertKey] = deque()  # routed, waiting for a slot

    # -- events ---------------------------------------------------------------------------------------------------

    def routed(self, layer: int, experts: Iterable[int]) -> list[Load]:
        """The router of `layer` chose `experts` (distinct). Raises RuntimeError if the last layer is not done yet."""
        if self._needed:
            raise RuntimeError(f"{len(self._needed)} experts of an earlier layer were not computed")
        keys = [(layer, expert) for expert in experts]
        self._needed.update(keys)
        for key in keys:
            if key in self._slot_of:
                self.used(key)
            else:
                self._queue.append(key)
        return self._serve_queue()

    def arrived(self, key: ExpertKey) -> list[Load]:
        """The load of `key` has finished."""
        self._loading.remove(key)
        return self._serve_queue()

    def computed(self, key: ExpertKey) -> list[Load]:
        """The engine no longer reads the slot of `key` for the layer at work."""
        self._needed.remove(key)
        return self._serve_queue()

    # -- questions ------------------------------------------------------------------------------------------------

    def is_resident(self, key: ExpertKey) -> bool:
        """Whether the record lies complete in a slot."""
        return key in self._slot_of and key not in self._loading

    def slot(self, key: ExpertKey) -> int:
        """The slot of a resident or loading record."""
        return self._slot_of[key]

    def check_integrity(self) -> None:
        """Raise AssertionError if a rule of the contract is broken."""
        held = list(self._slot_of.values())
        assert len(held) == len(set(held)), "two records share a slot"
        assert sorted(held + self._free) == list(range(self.slots)), "a slot is lost or counted twice"
        assert self._loading <= self._slot_of.keys(), "a record is loading without a slot"
        assert set(self._queue).isdisjoint(self._slot_of), "a queued record has a slot already"
        assert self._needed <= self._slot_of.keys() | set(self._queue), "a routed expert is forgotten"
        assert not self._queue or not self._free, "a demand load waits beside a free slot"

    # -- what a policy decides ------------------------------------------------------------------------------------

    @abstractmethod
    def victim(self) -> ExpertKey | None:
        """The record to evict next, one for which `evictable` holds, or None to keep all for now."""

    def used(self, key: ExpertKey) -> None:  # noqa: B027 - a policy may ignore it
        """`key` was routed and has, or just got, a slot."""

    def evicted(self, key: ExpertKey) -> None:  # noqa: B027 - a policy may ignore it
        """`key` has lost its slot."""

    def evictable(self, key: ExpertKey) -> bool:
        """Whether a resident record may be evicted: the layer at work does not need it."""
        return key not in self._needed and key not in self._loading

    # -- the mechanics --------------------------------------------------------------------------------------------

    def _serve_queue(self) -> list[Load]:
        loads = []
        while self._queue and (self._free or self._evict_one()):
            key = self._queue.popleft()
            slot = self._slot_of[key] = self._free.pop()
            self._loading.add(key)
            self.used(key)
            loads.append(Load(key, slot))
        return loads

    def _evict_one(self) -> bool:
        key = self.victim()
        if key is None:
            return False
        self._evict(key)
        return True

    def _evict(self, key: ExpertKey) -> None:
        if not self.evictable(key):
            raise RuntimeError(f"the policy evicts {key}, which is in use")
        self._free.append(self._slot_of.pop(key))
        self.evicted(key)
