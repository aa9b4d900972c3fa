"""`lru`: one pool of slots for all layers, the least recently used record leaves first."""

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
