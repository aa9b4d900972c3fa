"""The link under virtual time: serial, without idle credit, cut into chunks that readers claim by urgency.

It is `memory/link.py` and its pacer as numbers: each of the readers holds one chunk, chunks are served in the order in
which they were claimed, and what is claimed cannot be overtaken any more.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from foregate.schedule import ExpertKey, Load
from foregate.simulate.machine import Machine

ROUNDING = 1e-12  # seconds that are nothing


@dataclass(eq=False)
class Transfer:
    """A load under way."""

    load: Load
    unclaimed: float  # seconds of link time that no reader has claimed yet
    seconds: float = 0.0  # that the link has worked on it
    running: int = 0  # chunks claimed and not through
    dropped: bool = False


@dataclass(frozen=True)
class Chunk:
    transfer: Transfer
    seconds: float
    ends: float  # when it is through, on the virtual clock


class VirtualLink:
    """Serves loads up to the time it is told; `ended` is called at the end of each, complete or dropped."""

    def __init__(self, machine: Machine, ended: Callable[[Transfer], None]) -> None:
        self.now = 0.0  # everything until then has happened
        self._machine, self._tell = machine, ended
        self._under_way: dict[ExpertKey, Transfer] = {}
        self._demand: dict[ExpertKey, Transfer] = {}  # those with something unclaimed, most urgent first
        self._prefetch: dict[ExpertKey, Transfer] = {}  # the latest is the most urgent
        self._claimed: deque[Chunk] = deque()
        self._ended: deque[Transfer] = deque()  # not told yet
        self._free_at = 0.0  # when all that is claimed is through
        self._work = 0.0  # seconds claimed so far

    @property
    def busy_seconds(self) -> float:
        """The time the link has worked."""
        return self._work - max(0.0, self._free_at - self.now)

    def submit(self, load: Load) -> None:
        """Queue a load. A record that has to cross the link the other way first takes as long again."""
        transfer = Transfer(load, self._machine.load_seconds * (1 if load.back is None else 2))
        self._under_way[load.key] = transfer
        (self._demand if load.demand else self._prefetch)[load.key] = transfer
        self._claim()

    def hurry(self, key: ExpertKey) -> None:
        """A prefetch has become a demand load, the least urgent of them."""
        if key in self._prefetch:
            self._demand[key] = self._prefetch.pop(key)

    def cancel(self, key: ExpertKey) -> None:
        """Drop what is unclaimed of a load. Ignored when it has ended."""
        transfer = self._under_way.get(key)
        if transfer is None:
            return
        transfer.dropped, transfer.unclaimed = True, 0.0
        self._demand.pop(key, None)
        self._prefetch.pop(key, None)
        self._end_if_done(transfer)

    def advance(self, until: float) -> None:
        """Let time pass until then, telling of every end at its time; what is started thereby is served too."""
        self._tell_ended()
        while self._claimed and self._claimed[0].ends <= until:
            self._finish_chunk()
            self._tell_ended()
        self.now = until

    def step(self) -> bool:
        """Go on to the end of the chunk at work. False when there is nothing on the link and nothing to tell."""
        if self._ended:
            self._tell_ended()
            return True
        if not self._claimed:
            return False
        self.advance(self._claimed[0].ends)
        return True

    def _finish_chunk(self) -> None:
        chunk = self._claimed.popleft()
        self.now = chunk.ends
        chunk.transfer.running -= 1
        chunk.transfer.seconds += chunk.seconds
        self._end_if_done(chunk.transfer)
        self._claim()

    def _end_if_done(self, transfer: Transfer) -> None:
        if not transfer.running and not transfer.unclaimed:
            del self._under_way[transfer.load.key]
            self._ended.append(transfer)

    def _tell_ended(self) -> None:
        while self._ended:
            self._tell(self._ended.popleft())

    def _claim(self) -> None:
        """Every idle reader takes the next chunk of the most urgent load."""
        while len(self._claimed) < self._machine.readers and (self._demand or self._prefetch):
            line = self._demand or self._prefetch
            key = next(iter(line) if self._demand else reversed(line))
            transfer = line[key]
            seconds = self._next_chunk(transfer)
            if not transfer.unclaimed:
                del line[key]
            transfer.running += 1
            self._free_at = max(self._free_at, self.now) + seconds
            self._work += seconds
            self._claimed.append(Chunk(transfer, seconds, self._free_at))

    def _next_chunk(self, transfer: Transfer) -> float:
        chunk = self._machine.chunk_seconds
        seconds = transfer.unclaimed if transfer.unclaimed <= chunk + ROUNDING else chunk
        transfer.unclaimed -= seconds
        return seconds
