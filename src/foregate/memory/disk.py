"""The disk tier: reader threads that fill slots with direct reads, one record a read, past the page cache."""

import os
import queue
import threading
from dataclasses import dataclass

from foregate.checkpoint.store import ExpertKey, Store
from foregate.errors import ForegateError
from foregate.memory.slots import SlotMemory
from foregate.schedule import Load

WAIT_SECONDS = 120.0  # a disk that answers nothing for so long is reported, not waited for


@dataclass(frozen=True)
class Finished:
    """A load that ended, well or with an error."""

    key: ExpertKey
    nbytes: int
    error: ForegateError | None = None


class DiskReader:
    """Carries out loads in the background.

    The contract: after `submit(load)` the slot belongs to the reader until `wait` returns its key. Loads in flight are
    bounded by the slots. `direct` says whether reads bypass the page cache; where the file system refuses that, reads
    are buffered and the pages dropped again. The GIL is free while a read waits.
    """

    def __init__(self, store: Store, memory: SlotMemory, readers: int) -> None:
        self._store, self._memory = store, memory
        self._fd, self.direct = _open(store)
        self._loads: queue.SimpleQueue[Load | None] = queue.SimpleQueue()
        self._finished: queue.SimpleQueue[Finished] = queue.SimpleQueue()
        self.in_flight = 0
        self._threads = [threading.Thread(target=self._run, name=f"reader-{i}", daemon=True) for i in range(readers)]
        for thread in self._threads:
            thread.start()

    def submit(self, load: Load) -> None:
        """Queue a load."""
        if not self._threads:
            raise ForegateError("this model was closed: load it again")
        self.in_flight += 1
        self._loads.put(load)

    def wait(self) -> Finished:
        """The next load to finish, in whatever order the disk answers. Raises ForegateError if the disk hangs."""
        try:
            finished = self._finished.get(timeout=WAIT_SECONDS)
        except queue.Empty:
            raise ForegateError(f"{self._store.experts_path}: no answer from the disk in {WAIT_SECONDS:g} s") from None
        self.in_flight -= 1
        return finished

    def close(self) -> None:
        """Finish what is queued, end the threads, close the file. May be called twice."""
        for _ in self._threads:
            self._loads.put(None)
        for thread in self._threads:
            thread.join()
        if self._threads:
            os.close(self._fd)
        self._threads = []

    def close_later(self) -> None:
        """Let the threads end when the disk answers, without waiting for it."""
        for _ in self._threads:
            self._loads.put(None)
        self._threads = []

    def _run(self) -> None:
        while (load := self._loads.get()) is not None:
            offset, nbytes = self._store.location(load.key)
            try:
                self._read(self._memory.buffer(load.slot, nbytes), offset)
                self._finished.put(Finished(load.key, nbytes))
            except Exception as error:  # whatever it is, the engine must hear of it
                what = getattr(error, "strerror", None) or str(error) or "the file ended early"
                name = self._store.record_name(load.key)
                message = f"{self._store.experts_path}: record {name} cannot be read ({what}); run foregate verify"
                self._finished.put(Finished(load.key, nbytes, ForegateError(message)))

    def _read(self, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):
            count = os.preadv(self._fd, [buffer[done:]], offset + done)
            if count == 0:
                raise OSError
            done += count
        if not self.direct:
            os.posix_fadvise(self._fd, offset, len(buffer), os.POSIX_FADV_DONTNEED)


def _open(store: Store) -> tuple[int, bool]:
    """(file descriptor, whether it reads past the page cache)."""
    try:
        fd = os.open(store.experts_path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return os.open(store.experts_path, os.O_RDONLY), False
    offset, nbytes = store.location((0, 0))
    try:  # some file systems open the file and refuse the first read
        probe = SlotMemory(1, nbytes)
        os.preadv(fd, [probe.buffer(0, nbytes)], offset)
        return fd, True
    except OSError:
        os.close(fd)
        return os.open(store.experts_path, os.O_RDONLY), False
