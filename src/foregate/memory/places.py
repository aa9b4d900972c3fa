"""Which record lies where in host memory. Bookkeeping alone, for several threads, without I/O."""

import heapq
import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from foregate.checkpoint.store import ALIGNMENT, ExpertKey

HALF_LIFE = 4  # times as many requests as there are places, after which a request counts half


@dataclass(eq=False)
class Place:
    """Room for one record, and what it holds of one."""

    memory: torch.Tensor  # uint8 [bytes of the largest record]
    key: ExpertKey | None = None
    present: int = 0  # of the record, a bit for each 4096 bytes
    checked: bool = False  # the record is whole, and the one that was converted
    users: int = 0  # at work on the record, which stays meanwhile

    def holds(self, start: int, nbytes: int) -> bool:
        """Whether all bytes from start to start + nbytes were read."""
        wanted = _bits(start, nbytes)
        return self.present & wanted == wanted


class Places:
    """Places by the record in them. What is asked for least often makes room for another, if nobody is at work on it.

    How often is a decayed count, the same that schedulers evict by: those above catch what is asked for again soon, so
    that the time since the last request says little here.
    """

    def __init__(self, memories: Iterable[torch.Tensor]) -> None:
        self._changed = threading.Condition()  # guards everything below
        self._free = [Place(memory) for memory in memories]
        self._half_life = HALF_LIFE * len(self._free)  # requests
        self._by_key: dict[ExpertKey, Place] = {}
        self._requests = 0
        self._scores: dict[ExpertKey, float] = {}  # log2 of the count, were later requests worth more; only ever grows
        self._heap: list[tuple[float, ExpertKey]] = []  # one entry a place, its score or an earlier one

    def __contains__(self, key: ExpertKey) -> bool:
        """Whether the record is there, whole and checked."""
        place = self._by_key.get(key)
        return place is not None and place.checked

    def asked(self, key: ExpertKey) -> None:
        """Count a request for the record."""
        with self._changed:
            self._requests += 1
            worth = self._requests / self._half_life
            self._scores[key] = worth + math.log2(1 + 2 ** (self._scores.get(key, -math.inf) - worth))

    @contextmanager
    def use(self, key: ExpertKey) -> Iterator[Place]:
        """The record's place, made if it has none, kept within the block. Waits while others are at work on all places.

        Who waits while using a place may wait for ever.
        """
        with self._changed:
            while not (place := self._by_key.get(key) or self._make_room(key)):
                self._changed.wait()
            place.users += 1
        try:
            yield place
        finally:
            self._leave(place)

    @contextmanager
    def find(self, key: ExpertKey) -> Iterator[Place | None]:
        """The record's place, kept within the block, or None if it has none."""
        with self._changed:
            if place := self._by_key.get(key):
                place.users += 1
        try:
            yield place
        finally:
            if place:
                self._leave(place)

    def add(self, place: Place, start: int, nbytes: int) -> None:
        """Bytes start .. start + nbytes were read, both multiples of 4096."""
        with self._changed:
            place.present |= _bits(start, nbytes)

    def _leave(self, place: Place) -> None:
        with self._changed:
            place.users -= 1
            self._changed.notify_all()

    def _make_room(self, key: ExpertKey) -> Place | None:
        place = self._free.pop() if self._free else self._evict()
        if place:
            place.key, place.present, place.checked = key, 0, False
            self._by_key[key] = place
            heapq.heappush(self._heap, (self._scores.get(key, -math.inf), key))
        return place

    def _evict(self) -> Place | None:
        """The place of the record with the lowest score that is not in use, now nobody's."""
        in_use, victim = [], None
        while self._heap and not victim:
            score, key = heapq.heappop(self._heap)
            if score < self._scores.get(key, -math.inf):
                heapq.heappush(self._heap, (self._scores[key], key))
            elif self._by_key[key].users:
                in_use.append((score, key))
            else:
                victim = self._by_key.pop(key)
        for entry in in_use:
            heapq.heappush(self._heap, entry)
        return victim


def _bits(start: int, nbytes: int) -> int:
    return ((1 << nbytes // ALIGNMENT) - 1) << start // ALIGNMENT
