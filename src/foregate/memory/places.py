"""Which record lies where in host memory. Bookkeeping alone, for several threads, without I/O."""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from foregate.checkpoint.store import ExpertKey


@dataclass(eq=False)
class Place:
    """Room for one record, and what it holds of one."""

    memory: torch.Tensor  # uint8 [bytes of the largest record]
    key: ExpertKey | None = None
    pieces: dict[int, int] = field(default_factory=dict)  # that were read: start -> bytes
    checked: bool = False  # the record is whole, and the one that was converted
    users: int = 0  # at work on the record, which stays meanwhile

    def holds(self, start: int, nbytes: int) -> bool:
        """Whether these bytes were read. Pieces are always cut in the same way, or are the whole record."""
        return self.pieces.get(start, 0) >= nbytes or self.pieces.get(0, 0) >= start + nbytes

    def is_whole(self, nbytes: int) -> bool:
        """Whether all `nbytes` of the record were read."""
        return sum(tuple(self.pieces.values())) >= nbytes  # a tuple, for another thread may add one meanwhile


class Places:
    """Places by the record in them. The least recently used that nobody is at work on makes room for another record."""

    def __init__(self, memories: Iterable[torch.Tensor]) -> None:
        self._changed = threading.Condition()  # guards everything below
        self._free = [Place(memory) for memory in memories]
        self._by_key: OrderedDict[ExpertKey, Place] = OrderedDict()  # least recently used first

    def __contains__(self, key: ExpertKey) -> bool:
        """Whether the record is there, whole and checked."""
        place = self._by_key.get(key)
        return place is not None and place.checked

    @contextmanager
    def use(self, key: ExpertKey) -> Iterator[Place]:
        """The record's place, made if it has none, kept within the block. Waits while others are at work on all places.

        Who waits while using a place may wait for ever.
        """
        with self._changed:
            while not (place := self._by_key.get(key) or self._make_room(key)):
                self._changed.wait()
            self._take(place)
        try:
            yield place
        finally:
            self._leave(place)

    @contextmanager
    def find(self, key: ExpertKey) -> Iterator[Place | None]:
        """The record's place, kept within the block, or None if it has none."""
        with self._changed:
            if place := self._by_key.get(key):
                self._take(place)
        try:
            yield place
        finally:
            if place:
                self._leave(place)

    def _take(self, place: Place) -> None:
        place.users += 1
        self._by_key.move_to_end(place.key)

    def _leave(self, place: Place) -> None:
        with self._changed:
            place.users -= 1
            self._changed.notify_all()

    def _make_room(self, key: ExpertKey) -> Place | None:
        place = self._free.pop() if self._free else self._evict()
        if place:
            place.key, place.checked = key, False
            place.pieces.clear()
            self._by_key[key] = place
        return place

    def _evict(self) -> Place | None:
        place = next((place for place in self._by_key.values() if not place.users), None)
        if place:
            del self._by_key[place.key]
        return place
