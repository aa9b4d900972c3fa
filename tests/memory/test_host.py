"""Records in host memory: all of them or some, read once, kept while they are held, checked when they come from disk."""

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from devices import WatchedDevice
from links import PATIENCE, open_descriptors, records_of

from foregate.checkpoint.store import ExpertKey, Store
from foregate.errors import ForegateError
from foregate.memory import disk, host
from foregate.memory.host import HostRecords

KEY = (1, 3)
MakeRecords = Callable[..., HostRecords]


@pytest.fixture
def opened(store: Callable[[str], Path], tmp_path: Path) -> Store:
    """A copy of the store that a test may change."""
    return Store(shutil.copytree(store("mixtral"), tmp_path / "store"))


@pytest.fixture
def expected(opened: Store) -> dict[ExpertKey, torch.Tensor]:
    return {key: record.clone() for key, record in records_of(opened).items()}


@pytest.fixture
def device() -> WatchedDevice:
    return WatchedDevice()


@pytest.fixture
def make(opened: Store, device: WatchedDevice) -> Iterator[MakeRecords]:
    """make(slots): records with so much room, closed after the test; all of them fit without a number."""
    made = []

    def make(slots: int | None = None, readers: int = 2) -> HostRecords:
        limit = None if slots is None else slots * opened.record_bytes
        made.append(HostRecords(opened, device, limit, readers=readers))
        return made[-1]

    yield make
    for records in made:
        records.close()


def bring(records: HostRecords, *keys: ExpertKey) -> None:
    """Have records read in two pieces."""
    for key in keys:
        for start, nbytes in ((0, 8192), (8192, records.record_bytes(key) - 8192)):
            with records.piece(key, start, nbytes):
                pass
        assert records.check(key)


def held(records: HostRecords, key: ExpertKey) -> torch.Tensor | None:
    with records.hold(key) as record:
        return None if record is None else record.clone()


def fail_reads_of(store: Store, key: ExpertKey, monkeypatch: pytest.MonkeyPatch) -> None:
    (first, nbytes), real = store.location(key), os.preadv

    def fail(fd: int, buffers: list[memoryview], offset: int) -> int:
        if first <= offset < first + nbytes:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers, offset)

    monkeypatch.setattr(disk, "RETRY_PAUSES", ())
    monkeypatch.setattr(os, "preadv", fail)


def overwrite(store: Store, key: ExpertKey, content: bytes) -> None:
    with store.experts_path.open("r+b") as stream:
        stream.seek(store.location(key)[0])
        stream.write(content)


# -- what fits --------------------------------------------------------------------------------------------------------


def test_all_records_are_read_once_and_the_disk_is_done_with(
    opened: Store, make: MakeRecords, expected: dict[ExpertKey, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    records = make()
    assert records.all_fit and not any(key in records for key in expected)
    records.fill()
    opened.experts_path.unlink()
    monkeypatch.setattr(os, "preadv", None)
    assert all(key in records and torch.equal(held(records, key), expected[key]) for key in expected)
    with records.piece(KEY, 4096, 8192) as piece:
        assert torch.equal(piece, expected[KEY][4096 : 4096 + 8192])


def test_a_record_longer_than_a_read_is_read_in_several(
    make: MakeRecords, expected: dict[ExpertKey, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, real = [], os.preadv
    monkeypatch.setattr(host, "CHUNK_BYTES", 16384)
    records = make()
    monkeypatch.setattr(os, "preadv", lambda fd, to, offset: lengths.append(len(to[0])) or real(fd, to, offset))
    records.fill()
    assert max(lengths) == 16384
    assert all(torch.equal(held(records, key), expected[key]) for key in expected)


@pytest.mark.parametrize("slots", [5, None])
def test_memory_comes_in_bounded_buffers_and_no_byte_of_it_twice(
    opened: Store, make: MakeRecords, device: WatchedDevice, monkeypatch: pytest.MonkeyPatch, slots: int | None
) -> None:
    monkeypatch.setattr(host, "BUFFER_BYTES", 3 * opened.record_bytes + 5)
    records = make(slots)
    sizes = [len(buffer) // opened.record_bytes for buffer in device.buffers]
    assert records.slots == sum(sizes) == (slots or opened.num_experts)
    assert max(sizes) == 3 and all(size == 3 for size in sizes[:-1])
    records.fill()
    records.close()
    assert [id(buffer) for buffer in device.released] == [id(buffer) for buffer in device.buffers]


def test_a_record_larger_than_a_buffer_has_one_of_its_own(
    make: MakeRecords, device: WatchedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "BUFFER_BYTES", 4096)
    make(4)
    assert len(device.buffers) == 4


def test_what_does_not_fit_stays_on_disk_until_it_is_wanted(
    make: MakeRecords, expected: dict[ExpertKey, torch.Tensor]
) -> None:
    records, keys = make(5), list(expected)
    records.fill()
    assert not records.all_fit and [key for key in keys if key in records] == keys[:5]
    assert held(records, keys[9]) is None
    for key in keys[:2]:  # held once more,
        assert torch.equal(held(records, key), expected[key])
    bring(records, *keys[2:4])  # copied once more: the fifth is now the one to go
    bring(records, keys[9])
    assert [key for key in keys if key in records] == [*keys[:4], keys[9]]
    assert torch.equal(held(records, keys[9]), expected[keys[9]])


def test_a_limit_without_room_for_the_readers_is_refused_and_the_smallest_works(
    opened: Store, device: WatchedDevice
) -> None:
    with pytest.raises(ForegateError, match="too small") as caught:
        HostRecords(opened, device, 3 * opened.record_bytes - 1, readers=3)
    smallest = int(str(caught.value).split()[-1])
    assert smallest == 3 * opened.record_bytes and not device.buffers
    HostRecords(opened, device, smallest, readers=3).close()


def test_memory_that_cannot_be_had_is_a_clear_error(
    opened: Store, device: WatchedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(nbytes: int) -> torch.Tensor:
        if device.buffers:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return WatchedDevice.host_buffer(device, nbytes)

    monkeypatch.setattr(host, "BUFFER_BYTES", opened.record_bytes)
    monkeypatch.setattr(device, "host_buffer", refuse)
    before = open_descriptors(opened.experts_path)
    with pytest.raises(ForegateError, match=r"cannot be had \(Cannot allocate memory\); give less with --host-memory"):
        HostRecords(opened, device, readers=2)
    assert len(device.released) == 1 and open_descriptors(opened.experts_path) == before


# -- holding ----------------------------------------------------------------------------------------------------------


def test_what_is_held_stays_while_all_others_come_by(
    make: MakeRecords, expected: dict[ExpertKey, torch.Tensor]
) -> None:
    records, keys = make(4), list(expected)
    records.fill()
    with records.hold(keys[0]) as first, records.hold(keys[1]) as second:
        bring(records, *keys[4:])
        assert torch.equal(first, expected[keys[0]]) and torch.equal(second, expected[keys[1]])
    bring(records, *keys[4:8])
    assert keys[0] not in records and keys[1] not in records


def test_who_wants_room_waits_until_a_record_is_let_go(
    make: MakeRecords, expected: dict[ExpertKey, torch.Tensor]
) -> None:
    records, keys = make(2), list(expected)
    records.fill()
    with ExitStack() as holds:
        for key in keys[:2]:
            holds.enter_context(records.hold(key))
        waiting = threading.Thread(target=bring, args=(records, keys[5]))
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive() and keys[0] in records and keys[1] in records
    waiting.join(PATIENCE)
    assert torch.equal(held(records, keys[5]), expected[keys[5]])


def test_a_record_in_the_making_cannot_be_held(make: MakeRecords) -> None:
    records = make(2)
    with records.piece(KEY, 0, records.record_bytes(KEY)):
        assert KEY not in records and held(records, KEY) is None  # whole, and not checked yet
        assert records.check(KEY)
        assert KEY in records and held(records, KEY) is not None


# -- faults -----------------------------------------------------------------------------------------------------------


def test_a_record_that_cannot_be_read_ends_the_filling_and_is_named(
    opened: Store, make: MakeRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = make()
    fail_reads_of(opened, KEY, monkeypatch)
    with pytest.raises(ForegateError, match="Input/output error.*foregate verify") as caught:
        records.fill()
    assert opened.record_name(KEY) in str(caught.value)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reader")]
    monkeypatch.undo()
    records.fill()  # the disk has recovered
    assert KEY in records


def test_a_piece_that_cannot_be_read_is_read_again_by_the_next(
    opened: Store, make: MakeRecords, expected: dict[ExpertKey, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    records = make(2)
    fail_reads_of(opened, KEY, monkeypatch)
    with pytest.raises(ForegateError), records.piece(KEY, 0, 8192):
        pass
    monkeypatch.undo()
    bring(records, KEY)
    assert torch.equal(held(records, KEY), expected[KEY])


def test_a_record_that_was_changed_is_not_taken(
    opened: Store, make: MakeRecords, expected: dict[ExpertKey, torch.Tensor]
) -> None:
    records, original = make(2), expected[KEY].numpy().tobytes()
    overwrite(opened, KEY, bytes(4096))
    with pytest.raises(ForegateError, match="damaged.*foregate verify") as caught:
        bring(records, KEY)
    assert opened.record_name(KEY) in str(caught.value) and KEY not in records
    bring(records, (0, 0))  # this one is as it was
    overwrite(opened, KEY, original)
    bring(records, KEY)  # read again, and right
    assert torch.equal(held(records, KEY), expected[KEY])


def test_nobody_can_tell_of_a_changed_file_and_a_record_that_lost_its_place(opened: Store, make: MakeRecords) -> None:
    records, nbytes = make(2), opened.record_bytes
    with records.piece(KEY, 0, 8192):
        pass
    bring(records, (0, 0), (0, 1))
    with records.piece(KEY, 8192, nbytes - 8192):
        pass
    assert records.check(KEY)  # an untouched file
    os.utime(opened.experts_path)
    assert not records.check(KEY)
    with records.piece(KEY, 0, nbytes):
        assert records.check(KEY)
    assert KEY in records
