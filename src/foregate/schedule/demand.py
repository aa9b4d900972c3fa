"""`demand`: load every chosen expert when it is needed and keep nothing: the floor that every cache must beat."""

from foregate.schedule.base import ExpertKey, Load, Scheduler


class DemandScheduler(Scheduler):
    """No cache beyond the layer at work: a record leaves as soon as it was computed."""

    def computed(self, key: ExpertKey) -> list[Load]:
        self._needed.remove(key)
        self._evict(key)
        return self._serve_queue()

    def victim(self) -> ExpertKey | None:
        return None
