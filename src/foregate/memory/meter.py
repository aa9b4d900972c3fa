"""Time on a link: how long it was busy and with what, and when a slower link would be done."""

import math

from foregate.memory.transfers import Chunk

FORGIVEN_SECONDS = 0.01  # that a thread may be late for a chunk; the GIL and a busy machine take a few milliseconds


class Meter:
    """Counts a link's busy time and bytes. Chunks in progress at once share the time evenly.

    `now` is in seconds and never goes back.
    """

    def __init__(self) -> None:
        self.busy_seconds = 0.0  # in which at least one chunk was in progress
        self.bytes_moved = 0
        self.running: list[Chunk] = []  # in progress, in the order of their start
        self._counted_to = 0.0

    def start(self, chunk: Chunk, now: float) -> None:
        """A chunk is in progress from now on."""
        self.count(now)
        self.running.append(chunk)

    def stop(self, chunk: Chunk, now: float, nbytes: int) -> None:
        """It is no longer; `nbytes` of it went over the link."""
        self.count(now)
        self.running.remove(chunk)
        self.bytes_moved += nbytes

    def count(self, now: float) -> None:
        """Account for the time up to now."""
        elapsed, self._counted_to = now - self._counted_to, now
        if self.running:
            self.busy_seconds += elapsed
        for chunk in self.running:
            chunk.transfer.seconds += elapsed / len(self.running)


class Pacer:
    """The times at which one serial link would complete chunks, spaced evenly.

    The link moves `bandwidth` bytes/s, unlimited when None, and each record takes `latency` seconds more, of which every
    chunk has its share. Idle time saves up no credit: a chunk starts at the earliest when it was asked for. A thread
    that comes late for a chunk that waited is forgiven, for a real link would not have paused; but only briefly, so
    that a slow carrier saves up no credit either.
    """

    def __init__(self, bandwidth: float | None, latency: float = 0.0) -> None:
        self.paced = bandwidth is not None or latency > 0
        self._bandwidth, self._latency = bandwidth or math.inf, latency
        self._free_at = 0.0

    def due(self, chunk: Chunk, now: float) -> float:
        """When `chunk`, which takes its turn on the link now, is through. Not later than now on an unlimited link."""
        start = max(self._free_at, chunk.transfer.submitted_at, now - FORGIVEN_SECONDS)
        self._free_at = start + chunk.nbytes / self._bandwidth + self._latency * chunk.share
        return self._free_at
