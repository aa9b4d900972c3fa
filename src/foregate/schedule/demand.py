"""`demand`: load every chosen expert when it is needed and keep nothing: the floor that every cache must beat."""

from collections.abc import Collection

from foregate.schedule.base import Action, ExpertKey, Scheduler


class DemandScheduler(Scheduler):
    """No cache beyond the layer at work: a record leaves as soon as it was computed."""

    def computed(self, keys: Collection[ExpertKey], now: float = 0.0) -> list[Action]:
        self._needed.difference_update(keys)
        for key in keys:
            self._evict(key)
        return self._go_on(now)

    def victim(self) -> ExpertKey | None:
        return None
