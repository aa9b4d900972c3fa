"""What happened when: the last events of a run, in a ring that never grows beyond its limit."""

import itertools
import time
from array import array
from typing import Any

from foregate.checkpoint.store import ExpertKey
from foregate.report.prefetches import KINDS
from foregate.schedule import Load, Prediction

PASSES, EXPERTS, GATES, STALLS, LOADS = "passes", "experts", "gates", "stalls", "loads"
COLUMNS = {  # of each kind's events; times in microseconds since recording began
    PASSES: ("start", "tokens"),  # at the first MoE layer's router
    EXPERTS: ("start", "duration", "layer", "experts"),  # the kernel at work
    GATES: ("start", "duration"),  # a prediction in the making
    STALLS: ("start", "duration", "layer"),
    LOADS: ("start", "duration", "layer", "expert", "kind"),  # from submission to the end
}
NAMES = tuple(COLUMNS)
WIDTH = 7  # numbers of an event: its own, its kind, start, end in seconds, and up to three further columns


class Timeline:
    """The last `limit` events. Each call notes one that ends now, so spans of the model's thread never overlap."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._ring = array("d", (0.0,)) * (WIDTH * limit)  # as tuples they would take five times the memory
        self._numbers = itertools.count(1)
        self._origin = time.perf_counter()
        self._submitted: dict[ExpertKey, float] = {}

    def passed(self, tokens: int) -> None:
        """The model begins with its MoE layers, for so many tokens."""
        self._add(PASSES, 0.0, tokens)

    def computed(self, layer: int, experts: int, seconds: float) -> None:
        """The kernel has worked for so long."""
        self._add(EXPERTS, seconds, layer, experts)

    def predicted(self, prediction: Prediction) -> None:
        """A gate has spoken."""
        self._add(GATES, prediction.seconds)

    def stalled(self, layer: int, seconds: float) -> None:
        """Compute has stood still for so long."""
        self._add(STALLS, seconds, layer)

    def submitted(self, load: Load) -> None:
        """A load begins to wait for the link."""
        self._submitted[load.key] = time.perf_counter()

    def loaded(self, key: ExpertKey, kind: str) -> None:
        """A load has ended."""
        if (start := self._submitted.pop(key, None)) is not None:
            self._add(LOADS, time.perf_counter() - start, *key, KINDS.index(kind))

    def to_json(self) -> dict[str, Any]:
        """events: how many there were, and those kept by kind, as rows of COLUMNS, in the order of their ends."""
        rows: dict[str, list[list]] = {kind: [] for kind in COLUMNS}
        ring = self._ring[:]  # at once: the link's threads may add to it
        events = sorted(tuple(ring[at : at + WIDTH]) for at in range(0, len(ring), WIDTH) if ring[at])
        for _, kind, start, end, *further in events:
            rows[NAMES[int(kind)]].append(self._row(NAMES[int(kind)], start, end, list(map(int, further))))
        return {"events": int(events[-1][0]) if events else 0, "columns": COLUMNS, **rows}

    def _row(self, kind: str, start: float, end: float, further: list[int]) -> list:
        first, last = self._microseconds(start), self._microseconds(end)
        if kind == PASSES:
            return [first, further[0]]
        if kind == LOADS:
            return [first, last - first, *further[:2], KINDS[further[2]]]
        return [first, last - first, *further[: len(COLUMNS[kind]) - 2]]

    def _add(self, kind: str, seconds: float, *further: int) -> None:
        now, number = time.perf_counter(), next(self._numbers)
        at = (number - 1) % self._limit * WIDTH
        values = (number, NAMES.index(kind), now - seconds, now, *further, *(0,) * (WIDTH - 4 - len(further)))
        self._ring[at : at + WIDTH] = array("d", values)

    def _microseconds(self, time_: float) -> int:
        return round((time_ - self._origin) * 1e6)
