"""The carrier from host memory to a device's slots; what is on disk only goes through host memory, piece by piece."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from foregate.checkpoint.store import ExpertKey
from foregate.errors import ForegateError
from foregate.memory.device import Device, Mark
from foregate.memory.disk import CHUNK_BYTES
from foregate.memory.host import HostRecords

COPY_BYTES = 4 << 20  # 80 to 160 us at 50 to 25 GB/s: long beside what a chunk costs, short beside a layer


class HostToDevice:
    """Copies records into `slots`, uint8 [slots, slot_bytes] on the device. See `Carrier`.

    The device's memory is reused without waiting on the host: `used(slots)` says that compute which reads these slots
    has been queued, and later copies into them wait for it on the device. The records are not the carrier's to close.
    """

    def __init__(
        self, records: HostRecords, device: Device, slots: torch.Tensor, chunk_bytes: int | None = None
    ) -> None:
        self.chunk_bytes = chunk_bytes or (COPY_BYTES if records.all_fit else CHUNK_BYTES)
        self._records, self._device, self._slots = records, device, slots
        self._last_use: dict[int, Mark] = {}
        self._idle = threading.Condition()  # guards what follows
        self._copying = 0  # threads in a copy
        self._closed = False

    @property
    def path(self) -> str:
        """How the device's copies go."""
        return self._device.path

    def used(self, slots: Iterable[int]) -> None:
        """Compute that reads these slots is queued: to be said before anybody may load into them again."""
        self._last_use.update(dict.fromkeys(slots, self._device.mark()))

    def carry(self, key: ExpertKey, slot: int, start: int, nbytes: int) -> None:
        with self._records.piece(key, start, nbytes) as piece:
            self._copy(key, slot, start, piece)

    def check(self, key: ExpertKey, slot: int) -> None:
        if self._records.check(key):
            return
        with self._records.piece(key, 0, self._records.record_bytes(key)) as record:  # again, in one: that can be told
            self._records.check(key)
            self._copy(key, slot, 0, record)

    def close(self) -> None:
        """From now on the slots stay as they are: waits for copies under way, not for a disk that hangs."""
        with self._idle:
            self._closed = True
            self._idle.wait_for(lambda: not self._copying)

    def _copy(self, key: ExpertKey, slot: int, start: int, piece: torch.Tensor) -> None:
        target = self._slots[slot, start : start + len(piece)]
        with self._into_slots():
            try:
                self._device.copy(target, piece, self._last_use.get(slot))
            except RuntimeError as error:
                name, reason = self._records.record_name(key), str(error).partition("\n")[0]
                raise ForegateError(f"record {name} cannot be copied to {self._device.name} ({reason})") from error

    @contextmanager
    def _into_slots(self) -> Iterator[None]:
        with self._idle:
            if self._closed:
                raise ForegateError("this load was given up")
            self._copying += 1
        try:
            yield
        finally:
            with self._idle:
                self._copying -= 1
                self._idle.notify_all()
