"""The disk's end of the link: the experts file, read past the page cache, with what can go wrong while it is read."""

import errno
import hashlib
import os
import time

from foregate.checkpoint.store import ALIGNMENT, ExpertKey, Store, file_version
from foregate.errors import ForegateError
from foregate.memory.slots import SlotMemory

RETRY_PAUSES = (0.01, 0.05, 0.25)  # seconds before each further attempt at a read that failed
CHUNK_BYTES = 1 << 20  # reads of this size run at the disk's full speed; a demand load waits 1 ms for one
REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)  # how file systems say that they have no direct reads


class ExpertsFile:
    """The open experts file of a store. Threads may read at the same time; the GIL is free while they do.

    `direct` says whether reads bypass the page cache; where the file system refuses that, pages are dropped after each
    read. Raises ForegateError if the file cannot be opened.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._changed = False  # since the store was opened
        try:
            self._fd, self.direct = _open(store)
        except OSError as error:
            raise ForegateError(
                f"{store.experts_path} cannot be opened ({_reason(error)}); run foregate verify"
            ) from error

    def read(self, key: ExpertKey, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of a record from `start` on; both multiples of 4096 bytes, in memory too.

        A read that fails is tried again a few times. Raises ForegateError, which names the record, if it fails still.
        """
        offset = self._store.location(key)[0] + start
        try:
            self._fill(buffer, offset)
            if not self.direct:
                os.posix_fadvise(self._fd, offset, len(buffer), os.POSIX_FADV_DONTNEED)
        except Exception as error:  # whatever it is, whoever waits for the record must hear of it
            raise self._unreadable(key, error) from error

    def check(self, key: ExpertKey, record: memoryview) -> None:
        """Make sure that a record just read is the one that was converted; free while nobody has touched the file.

        Once the file has changed since the store was opened, every record is compared with its SHA-256. Raises
        ForegateError if they differ.
        """
        layer, expert = key
        if self.changed(key) and hashlib.sha256(record).hexdigest() != self._store.manifest.checksums[layer][expert]:
            raise ForegateError(
                f"{self._store.experts_path}: record {self._store.record_name(key)} is damaged: the file was changed "
                f"while it was in use; run foregate verify"
            )

    def changed(self, key: ExpertKey) -> bool:
        """Whether anybody has touched the file since the store was opened. Raises ForegateError, which names `key`."""
        try:
            self._changed = self._changed or file_version(os.fstat(self._fd)) != self._store.experts_version
        except OSError as error:
            raise self._unreadable(key, error) from error
        return self._changed

    def close(self) -> None:
        """Close the file. What still reads then fails. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _fill(self, buffer: memoryview, offset: int) -> None:
        done, pauses = 0, iter(RETRY_PAUSES)
        while done < len(buffer):
            try:
                done += self._read_some(buffer[done:], offset + done)
            except OSError:
                pause = next(pauses, None)
                if pause is None:
                    raise
                time.sleep(pause)

    def _read_some(self, buffer: memoryview, offset: int) -> int:
        """Bytes read, at least one; after a short direct read as many as the next one may start behind."""
        count = os.preadv(self._fd, [buffer], offset)
        if self.direct:
            count -= count % ALIGNMENT
        if count == 0:
            raise OSError("the file ended early")
        return count

    def _unreadable(self, key: ExpertKey, error: Exception) -> ForegateError:
        name = self._store.record_name(key)
        return ForegateError(
            f"{self._store.experts_path}: record {name} cannot be read ({_reason(error)}); run foregate verify"
        )


class DiskToHost:
    """The carrier that reads records from the experts file of `store` into the slots of `memory`.

    Raises ForegateError if the file cannot be opened. See `Carrier`.
    """

    def __init__(self, store: Store, memory: SlotMemory, chunk_bytes: int = CHUNK_BYTES) -> None:
        if chunk_bytes < 1 or chunk_bytes % ALIGNMENT:
            raise ValueError(f"direct reads of {chunk_bytes} bytes are impossible")
        self.chunk_bytes = chunk_bytes
        self._file, self._memory = ExpertsFile(store), memory
        self._record_bytes = lambda key: store.location(key)[1]

    @property
    def path(self) -> str:
        return "direct" if self._file.direct else "buffered"

    def carry(self, key: ExpertKey, slot: int, start: int, nbytes: int) -> None:
        self._file.read(key, start, self._memory.buffer(slot, start + nbytes)[start:])

    def check(self, key: ExpertKey, slot: int) -> None:
        self._file.check(key, self._memory.buffer(slot, self._record_bytes(key)))

    def close(self) -> None:
        self._file.close()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _open(store: Store) -> tuple[int, bool]:
    """(file descriptor, whether it reads past the page cache)."""
    try:
        fd = os.open(store.experts_path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        return _open_buffered(store), False
    try:  # some file systems open the file and refuse the first read
        os.preadv(fd, [SlotMemory(1, ALIGNMENT).buffer(0, ALIGNMENT)], store.location((0, 0))[0])
    except OSError as error:
        if error.errno in REFUSALS:
            os.close(fd)
            return _open_buffered(store), False
    return fd, True


def _open_buffered(store: Store) -> int:
    fd = os.open(store.experts_path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # without it the kernel reads ahead, into pages nobody drops
    return fd
