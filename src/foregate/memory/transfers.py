"""Loads on their way over a link, cut into chunks: which chunk comes next. Bookkeeping alone, without threads or I/O.

Demand loads come first, in the order in which they became one (by being submitted, or by `hurry`), then prefetches, the
latest first: another one is only asked for while one is under way when it is more urgent. Urgency is looked at for every
chunk: a prefetch that was overtaken goes on where it was.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from foregate.checkpoint.store import ExpertKey
from foregate.errors import ForegateError
from foregate.schedule import Load


@dataclass(frozen=True, eq=False)
class Chunk:
    """Bytes of a record that one thread moves at a time."""

    transfer: "Transfer"
    key: ExpertKey  # the record they belong to: the load's own, or its `back`
    start: int  # bytes from the start of the record
    nbytes: int
    share: float  # of the record's bytes


@dataclass(eq=False)
class Transfer:
    """A load under way."""

    load: Load
    submitted_at: float  # seconds, on the link's clock
    waiting: deque[Chunk] = field(default_factory=deque)
    running: list[Chunk] = field(default_factory=list)
    nbytes: int = 0  # moved so far
    seconds: float = 0.0  # that the link has worked on it
    dropped: bool = False
    error: ForegateError | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing of it is waiting or in progress."""
        return not self.waiting and not self.running

    def claim(self) -> Chunk | None:
        """The next chunk, or None while chunks of `back`, which use the same slot, are still in progress."""
        if any(chunk.key != self.waiting[0].key for chunk in self.running):
            return None
        self.running.append(self.waiting.popleft())
        return self.running[-1]


class TransferQueue:
    """All transfers that have not ended, by urgency.

    `record_bytes(key)` is the size of a record; chunks have `chunk_bytes` bytes, the last of a record perhaps fewer.
    """

    def __init__(self, record_bytes: Callable[[ExpertKey], int], chunk_bytes: int) -> None:
        self._record_bytes, self._chunk_bytes = record_bytes, chunk_bytes
        self._under_way: dict[ExpertKey, Transfer] = {}
        self._demand: dict[ExpertKey, Transfer] = {}  # those with chunks waiting, most urgent first
        self._prefetch: dict[ExpertKey, Transfer] = {}  # the latest is the most urgent

    def __contains__(self, key: ExpertKey) -> bool:
        """Whether the record is under way."""
        return key in self._under_way

    def add(self, load: Load, now: float) -> None:
        """Queue a load of a record that is not under way."""
        transfer = Transfer(load, now)
        for key in (load.back, load.key):
            if key is not None:
                transfer.waiting.extend(self._cut(transfer, key))
        self._under_way[load.key] = transfer
        (self._demand if load.demand else self._prefetch)[load.key] = transfer

    def hurry(self, key: ExpertKey) -> None:
        """Make a prefetch a demand load. Nothing to do when none of its chunks waits any more."""
        if key in self._prefetch:
            self._demand[key] = self._prefetch.pop(key)

    def cancel(self, key: ExpertKey) -> Transfer | None:
        """Drop what waits of a transfer. Returns it if it has ended thereby; its last running chunk ends it otherwise."""
        transfer = self._under_way.get(key)
        if transfer is None or transfer.dropped:
            return None
        transfer.dropped = True
        self._stop(transfer)
        return self._remove_ended(transfer)

    def claim(self) -> Chunk | None:
        """The most urgent chunk, now running; None when there is nothing to start."""
        for line, keys in ((self._demand, iter(self._demand)), (self._prefetch, reversed(self._prefetch))):
            for key in keys:
                if chunk := line[key].claim():
                    if not line[key].waiting:
                        del line[key]
                    return chunk
        return None

    def complete(self, chunk: Chunk, error: ForegateError | None) -> Transfer | None:
        """A running chunk is through, or has failed, and its transfer with it. Returns the transfer if it has ended."""
        transfer = chunk.transfer
        transfer.running.remove(chunk)
        if error is None:
            transfer.nbytes += chunk.nbytes
        else:
            transfer.error = error
            self._stop(transfer)
        return self._remove_ended(transfer)

    def _cut(self, transfer: Transfer, key: ExpertKey) -> list[Chunk]:
        nbytes, step = self._record_bytes(key), self._chunk_bytes
        sizes = [(start, min(step, nbytes - start)) for start in range(0, nbytes, step)]
        return [Chunk(transfer, key, start, size, size / nbytes) for start, size in sizes]

    def _stop(self, transfer: Transfer) -> None:
        transfer.waiting.clear()
        self._demand.pop(transfer.load.key, None)
        self._prefetch.pop(transfer.load.key, None)

    def _remove_ended(self, transfer: Transfer) -> Transfer | None:
        if not transfer.ended:
            return None
        del self._under_way[transfer.load.key]
        return transfer
