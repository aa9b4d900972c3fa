"""What becomes of each prefetch, seen from the loads alone: used in time, used late, or for nothing."""

from collections.abc import Iterable
from dataclasses import dataclass

from foregate.checkpoint.store import ExpertKey
from foregate.memory.link import Finished
from foregate.schedule import Load

DEMAND, PREFETCH, LATE, CANCELLED = "demand", "prefetch", "late", "cancelled"
KINDS = (DEMAND, PREFETCH, LATE, CANCELLED)  # of loads, when they have ended


@dataclass
class PrefetchCounts:
    """One MoE layer's prefetches, in records and in the bytes that moved for them."""

    started: int = 0
    in_time: int = 0  # resident when routed
    late: int = 0  # under way when routed, and waited for: a part of the wait was saved
    wasted: int = 0  # cancelled, or its slot was given away, before any use
    bytes_moved: int = 0
    useful_bytes: int = 0  # of those in time
    late_bytes: int = 0
    wasted_bytes: int = 0

    @property
    def unused_bytes(self) -> int:
        """Of records that are there and were not used yet."""
        return self.bytes_moved - self.useful_bytes - self.late_bytes - self.wasted_bytes


@dataclass
class _Prefetch:
    slot: int
    nbytes: int = 0
    arrived: bool = False
    routed: bool = False  # while it was under way


class PrefetchLedger:
    """Follows every prefetch until it is used or lost. A load into a slot ends the stay of what was there."""

    def __init__(self, layers: int) -> None:
        self.layers = [PrefetchCounts() for _ in range(layers)]
        self._open: dict[ExpertKey, _Prefetch] = {}
        self._in_slot: dict[int, ExpertKey] = {}  # of those that are open

    def submitted(self, load: Load) -> None:
        """The link was given a load."""
        for lost in (self._in_slot.get(load.slot), load.key):
            if lost in self._open:
                self._waste(lost)
        if not load.demand:
            self._open[load.key] = _Prefetch(load.slot)
            self._in_slot[load.slot] = load.key
            self.layers[load.key[0]].started += 1

    def routed(self, layer: int, experts: Iterable[int]) -> None:
        """These experts are used now, from their slots."""
        if not self._open:
            return
        for expert in experts:
            prefetch = self._open.get((layer, expert))
            if prefetch is None:
                continue
            if prefetch.arrived:
                self._close((layer, expert))
                self.layers[layer].in_time += 1
                self.layers[layer].useful_bytes += prefetch.nbytes
            else:
                prefetch.routed = True

    def ended(self, finished: Finished) -> str:
        """A load has ended. Returns what kind it was."""
        prefetch, counts = self._open.get(finished.key), self.layers[finished.key[0]]
        if prefetch is None:
            return DEMAND
        prefetch.nbytes = finished.nbytes
        counts.bytes_moved += finished.nbytes
        if finished.dropped or finished.error:
            self._waste(finished.key)
            return CANCELLED
        if prefetch.routed:
            self._close(finished.key)
            counts.late += 1
            counts.late_bytes += finished.nbytes
            return LATE
        prefetch.arrived = True
        return PREFETCH

    def emptied(self) -> None:
        """Nothing is resident any more."""
        for key in list(self._open):
            self._waste(key)

    def _waste(self, key: ExpertKey) -> None:
        counts = self.layers[key[0]]
        counts.wasted += 1
        counts.wasted_bytes += self._close(key).nbytes

    def _close(self, key: ExpertKey) -> _Prefetch:
        prefetch = self._open.pop(key)
        del self._in_slot[prefetch.slot]
        return prefetch
