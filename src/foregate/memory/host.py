"""Records in host memory: as many as fit, read from the disk straight into memory that a device copies from."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from foregate.checkpoint.store import ExpertKey, Store
from foregate.errors import ForegateError
from foregate.memory.device import Device
from foregate.memory.disk import CHUNK_BYTES, ExpertsFile
from foregate.memory.places import Places

BUFFER_BYTES = 1 << 30  # pinned at a time, so that what the system refuses is little


class HostRecords:
    """Records of `store` in host memory of `device`, all of them or as many as `limit_bytes` has room for.

    Those that do not fit stay on disk; each is read when it is wanted, in the place of one that is wanted less often.
    Any number of threads may ask at a time, but at most `readers` for pieces. Raises ForegateError if the experts file
    cannot be opened, if the memory cannot be had, or if the limit has no room for one record a reader.
    """

    def __init__(self, store: Store, device: Device, limit_bytes: int | None = None, *, readers: int) -> None:
        self._store, self._device, self._readers = store, device, readers
        self.slots = _count_slots(store, limit_bytes, readers)  # records that there is room for
        self._file = ExpertsFile(store)
        self._buffers: list[torch.Tensor] = []
        try:
            self._allocate()
        except BaseException:
            self.close()
            raise
        rows = (buffer.view(-1, store.record_bytes) for buffer in self._buffers)
        self._places = Places(itertools.chain.from_iterable(rows))

    @property
    def all_fit(self) -> bool:
        """Whether the disk is not needed once `fill` is through."""
        return self.slots == self._store.num_experts

    def __contains__(self, key: ExpertKey) -> bool:
        """Whether the record is in host memory now."""
        return key in self._places

    def record_bytes(self, key: ExpertKey) -> int:
        """Bytes of a record."""
        return self._store.location(key)[1]

    def record_name(self, key: ExpertKey) -> str:
        """The record as errors name it."""
        return self._store.record_name(key)

    def fill(self) -> None:
        """Read as many records as fit, with several threads. Raises ForegateError, which names the record."""
        keys = ((n, e) for n, layer in enumerate(self._store.layers) for e in range(layer.num_experts))
        pool = ThreadPoolExecutor(self._readers, "reader")
        try:
            for record in [pool.submit(self._bring, key) for key in itertools.islice(keys, self.slots)]:
                record.result()
        finally:
            pool.shutdown(cancel_futures=True)

    @contextmanager
    def hold(self, key: ExpertKey) -> Iterator[torch.Tensor | None]:
        """The record, uint8 [nbytes] in host memory, where it stays within the block; None when only the disk has it.

        A thread that holds records must not wait for a load: the load may wait for their room.
        """
        with self._places.find(key) as place:
            if place and place.checked:
                self._places.asked(key)
                yield place.memory[: self.record_bytes(key)]
            else:
                yield None

    @contextmanager
    def piece(self, key: ExpertKey, start: int, nbytes: int) -> Iterator[torch.Tensor]:
        """Bytes start .. start + nbytes of a record in host memory, where they stay within the block; not checked yet.

        What is not there is read, which takes until it is. Both ends are multiples of 4096. Raises ForegateError, which
        names the record, when it cannot be read.
        """
        if start == 0:
            self._places.asked(key)
        with self._places.use(key) as place:
            piece = place.memory[start : start + nbytes]
            if not place.holds(start, nbytes):
                self._read(key, start, piece)
                self._places.add(place, start, nbytes)
            yield piece

    def check(self, key: ExpertKey) -> bool:
        """Make sure that a record all of whose pieces were asked for is the one that was converted.

        False when nobody can tell: the file was changed, and some of the record has had to make room for others since.
        Raises ForegateError, which names the record, if it is another.
        """
        with self._places.find(key) as place:
            nbytes = self.record_bytes(key)
            if place is None or not place.holds(0, nbytes):
                return not self._file.changed(key)
            if not place.checked:
                try:
                    self._file.check(key, _view(place.memory[:nbytes]))
                except ForegateError:
                    place.present = 0  # to be read again by the next who asks
                    raise
                place.checked = True
            return True

    def close(self) -> None:
        """Unpin the memory and close the file; no copy may be under way. May be called twice."""
        for buffer in self._buffers:
            self._device.release(buffer)
        self._buffers.clear()
        self._file.close()

    def _allocate(self) -> None:
        left, slot_bytes = self.slots, self._store.record_bytes
        try:
            while left:
                slots = min(left, max(1, BUFFER_BYTES // slot_bytes))
                self._buffers.append(self._device.host_buffer(slots * slot_bytes))
                left -= slots
        except OSError as error:
            raise ForegateError(
                f"{self.slots * slot_bytes / 2**30:.2f} GiB of host memory for records cannot be had "
                f"({error.strerror}); give less with --host-memory"
            ) from error

    def _bring(self, key: ExpertKey) -> None:
        with self.piece(key, 0, self.record_bytes(key)):
            self.check(key)

    def _read(self, key: ExpertKey, start: int, piece: torch.Tensor) -> None:
        buffer = _view(piece)
        for done in range(0, len(buffer), CHUNK_BYTES):
            self._file.read(key, start + done, buffer[done : done + CHUNK_BYTES])


def _count_slots(store: Store, limit_bytes: int | None, readers: int) -> int:
    if limit_bytes is None:
        return store.num_experts
    slots = min(limit_bytes // store.record_bytes, store.num_experts)
    if slots < min(readers, store.num_experts):
        smallest = readers * store.record_bytes
        raise ForegateError(
            f"--host-memory {limit_bytes} is too small: each of {readers} readers needs room for an expert; the smallest "
            f"that works is --host-memory {smallest}"
        )
    return slots


def _view(memory: torch.Tensor) -> memoryview:
    """The same memory for reads."""
    return memoryview(memory.numpy())
