"""The link that fills slots: threads that have a carrier move the most urgent loads, a chunk at a time."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from foregate.checkpoint.store import ALIGNMENT, ExpertKey
from foregate.errors import ForegateError
from foregate.memory.carrier import Carrier
from foregate.memory.meter import Meter, Pacer
from foregate.memory.transfers import Chunk, Transfer, TransferQueue
from foregate.schedule import Load

PACED_CHUNK_SECONDS = 0.0005  # of link time, so that a slow link too is paced evenly and soon free for demand


def paced_chunk_bytes(bandwidth: float) -> float:
    """Of a link paced to so many bytes/s, at most: half a millisecond, but not less than the disk's blocks."""
    return max(bandwidth * PACED_CHUNK_SECONDS, ALIGNMENT)


@dataclass(frozen=True)
class Finished:
    """A load that ended: complete, dropped, or with an error."""

    key: ExpertKey
    nbytes: int  # that went over the link for it, `back` included; fewer when it was dropped or failed
    seconds: float  # that the link worked on it; chunks in progress at once share the time
    dropped: bool = False  # cancelled before it was complete
    error: ForegateError | None = None


class Link:
    """Carries out loads in the background, demand loads first.

    From `submit(load)` until `finished` is called with its key the slot belongs to the link. A load has its own slot,
    so loads in flight are bounded by the slots. Readers take chunks, not records: several share one record, a demand
    load waits for at most one chunk a reader, and the prefetch it overtakes goes on where it was.

    `finished` is called once for every load, by a reader thread, one call at a time, in the order in which loads end.
    No lock is held: it may call `submit`, `hurry` and `cancel`, but not wait for another load. If it raises, the error
    goes to `threading.excepthook`, the other loads go on, and `submit` raises RuntimeError from then on: whoever lost
    count of the loads cannot be trusted with more.

    A record that the carrier cannot bring, or finds damaged, ends with the carrier's error. Other loads go on. The
    carrier belongs to the link, which closes it.

    `bandwidth` (bytes/s) makes the link as slow as that, and `latency` (seconds) is added to every record: chunks are
    complete in the order in which they were claimed, evenly spaced, and idle time saves up no credit.
    """

    def __init__(
        self,
        carrier: Carrier,
        *,
        slots: int,
        record_bytes: Callable[[ExpertKey], int],
        readers: int,
        finished: Callable[[Finished], None],
        bandwidth: float | None = None,
        latency: float = 0.0,
    ) -> None:
        if readers < 1 or latency < 0 or (bandwidth is not None and not bandwidth > 0):
            raise ValueError(f"no link has readers={readers}, bandwidth={bandwidth}, latency={latency}")
        chunk_bytes = carrier.chunk_bytes
        if bandwidth is not None:
            chunk_bytes = int(min(paced_chunk_bytes(bandwidth), chunk_bytes)) // ALIGNMENT * ALIGNMENT
        self._carrier, self._slot_count, self._finished = carrier, slots, finished
        self._changed = threading.Condition()  # guards everything below
        self._queue = TransferQueue(record_bytes, chunk_bytes)
        self._meter, self._pacer = Meter(), Pacer(bandwidth, latency)
        self._slots: set[int] = set()  # of loads in flight
        self._ended: deque[Transfer] = deque()  # not yet told to `finished`
        self._telling = False  # a thread is in `finished`
        self._closing = self._abandoned = False
        self._callback_error: BaseException | None = None
        self._threads = [threading.Thread(target=self._run, name=f"reader-{i}", daemon=True) for i in range(readers)]
        self._threads_left = readers
        for thread in self._threads:
            thread.start()

    @property
    def path(self) -> str:
        """The way the bytes take, as the carrier calls it."""
        return self._carrier.path

    @property
    def in_flight(self) -> int:
        """Loads submitted and not finished. In `finished` the load it tells of no longer counts."""
        return len(self._slots)

    @property
    def busy_seconds(self) -> float:
        """Time in which at least one chunk was in progress."""
        with self._changed:
            self._meter.count(time.perf_counter())
            return self._meter.busy_seconds

    @property
    def bytes_moved(self) -> int:
        """Bytes that went over the link."""
        return self._meter.bytes_moved

    def submit(self, load: Load) -> None:
        """Queue a load. Raises ValueError if its record or its slot is in flight, ForegateError after `close`."""
        with self._changed:
            if self._closing:
                raise ForegateError("this model was closed: load it again")
            if self._callback_error is not None:
                raise RuntimeError("the end of a load could not be handled") from self._callback_error
            if not 0 <= load.slot < self._slot_count or load.slot in self._slots or load.key in self._queue:
                raise ValueError(f"{load}: there is no such slot, or it or the record is in flight already")
            self._slots.add(load.slot)  # first: interrupted in between, the slot must not seem free
            self._queue.add(load, time.perf_counter())
            self._changed.notify_all()

    def hurry(self, key: ExpertKey) -> None:
        """A prefetch has become a demand load, the least urgent of them. Ignored when it is not in flight."""
        with self._changed:
            self._queue.hurry(key)

    def cancel(self, key: ExpertKey) -> None:
        """Drop a load: no chunk of it starts any more. Ignored when it is not in flight.

        `finished` tells when its last chunk in progress is through, and the slot is free; or that it was complete.
        """
        with self._changed:
            if transfer := self._queue.cancel(key):
                self._ended.append(transfer)
                self._changed.notify_all()

    def close(self) -> None:
        """Finish what is in flight, end the threads, close the carrier. May be called twice."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def close_later(self) -> None:
        """Give up on a carrier that hangs: the threads end, and it is closed, when it answers.

        Loads in flight are forgotten: no call of `finished` begins after this, but one may be about to. Their slots
        must not be used again, for bytes may still land there.
        """
        with self._changed:
            self._closing = self._abandoned = True
            self._threads = []
            self._changed.notify_all()

    # -- the reader threads ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        while task := self._next_task():
            task()
        with self._changed:
            self._threads_left -= 1
            last = not self._threads_left
        if last:
            self._carrier.close()

    def _next_task(self) -> Callable[[], None] | None:
        """What a thread is to do next, or None when it is to end."""
        with self._changed:
            while not self._abandoned:
                if self._ended and not self._telling:
                    self._telling = True
                    return partial(self._tell, self._ended.popleft())
                if chunk := self._queue.claim():
                    now = time.perf_counter()
                    self._meter.start(chunk, now)
                    return partial(self._move, chunk, self._pacer.due(chunk, now))
                if self._closing and not self._slots:
                    return None
                self._changed.wait()
            return None

    def _move(self, chunk: Chunk, due: float) -> None:
        error = None
        try:
            self._carrier.carry(chunk.key, chunk.transfer.load.slot, chunk.start, chunk.nbytes)
        except ForegateError as failure:
            error = failure
        if (early := due - time.perf_counter()) > 0:
            time.sleep(early)
        with self._changed:
            if self._pacer.paced:
                self._changed.wait_for(lambda: self._meter.running[0] is chunk)
            self._meter.stop(chunk, time.perf_counter(), 0 if error else chunk.nbytes)
            if ended := self._queue.complete(chunk, error):
                self._ended.append(ended)
            self._changed.notify_all()  # the next chunk in turn, chunks that waited for `back`, or somebody to tell

    def _tell(self, transfer: Transfer) -> None:
        load, error = transfer.load, transfer.error
        if transfer.dropped:
            error = None  # nobody waits for it
        elif error is None:
            error = self._damage(load)
        with self._changed:
            self._slots.remove(load.slot)
        finished = Finished(load.key, transfer.nbytes, transfer.seconds, transfer.dropped, error)
        try:
            self._finished(finished)
        except BaseException as failure:  # whatever it is: a thread that ends in silence would leave loads unfinished
            self._callback_error = failure
            thread = threading.current_thread()
            threading.excepthook(threading.ExceptHookArgs((type(failure), failure, failure.__traceback__, thread)))
        with self._changed:
            self._telling = False
            self._changed.notify_all()

    def _damage(self, load: Load) -> ForegateError | None:
        """What is wrong with the record that has come into the slot."""
        try:
            self._carrier.check(load.key, load.slot)
        except ForegateError as failure:
            return failure
        return None
