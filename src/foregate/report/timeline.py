"""What happened when: the last events of a run, in a ring that never grows beyond its limit."""

import itertools
import time
from collections import deque
from typing import Any

from foregate.checkpoint.store import ExpertKey
from foregate.schedule import Load, Prediction

PASSES, EXPERTS, GATES, STALLS, LOADS = "passes", "experts", "gates", "stalls", "loads"
COLUMNS = {  # of each kind's events; times in microseconds since recording began
    PASSES: ("start", "tokens"),  # at the first MoE layer's router
    EXPERTS: ("start", "duration", "layer", "experts"),  # the kernel at work
    GATES: ("start", "duration"),  # a prediction in the making
    STALLS: ("start", "duration", "layer"),
    LOADS: ("start", "duration", "layer", "expert", "kind"),  # from submission to the end
}


class Timeline:
    """The last `limit` events. Each call notes one that ends now, so spans of the model's thread never overlap."""

    def __init__(self, limit: int) -> None:
        self._events: deque[tuple] = deque(maxlen=limit)  # (number, kind, start, end, further columns), in seconds
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
            self._add(LOADS, time.perf_counter() - start, *key, kind)

    def to_json(self) -> dict[str, Any]:
        """events: how many there were, and those kept by kind, as rows of COLUMNS, in the order of their ends."""
        rows: dict[str, list[list]] = {kind: [] for kind in COLUMNS}
        events = list(self._events)  # at once: the link's threads may add to them
        for _, kind, start, end, *further in events:
            first, last = self._microseconds(start), self._microseconds(end)
            rows[kind].append([first, *further] if kind == PASSES else [first, last - first, *further])
        return {"events": max((event[0] for event in events), default=0), "columns": COLUMNS, **rows}

    def _add(self, kind: str, seconds: float, *further: Any) -> None:
        now = time.perf_counter()
        self._events.append((next(self._numbers), kind, now - seconds, now, *further))

    def _microseconds(self, time_: float) -> int:
        return round((time_ - self._origin) * 1e6)
