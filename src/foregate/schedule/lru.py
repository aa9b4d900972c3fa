"""`lru`: one pool of slots for all layers, the least recently used record leaves first.

What placement computed on the host counts as used: it is loaded when the link is idle.
"""

from collections import OrderedDict

from foregate.schedule.base import ExpertKey, Scheduler, Shape


class LruScheduler(Scheduler):
    """Plain LRU over all layers' experts."""

    def __init__(self, slots: int, shape: Shape) -> None:
        super().__init__(slots, shape)
        self._recency: OrderedDict[ExpertKey, None] = OrderedDict()  # oldest first

    def used(self, key: ExpertKey) -> None:
        self._recency[key] = None
        self._recency.move_to_end(key)

    def evicted(self, key: ExpertKey) -> None:
        del self._recency[key]

    def victim(self) -> ExpertKey | None:
        return next((key for key in self._recency if self.evictable(key)), None)

    def next_prefetch(self, now: float) -> ExpertKey | None:
        return self.load_for_later()

    def prefetch_slot(self, key: ExpertKey) -> int | None:
        slot = self.demand_slot(key)
        if slot is not None:
            self.used(key)
        return slot
