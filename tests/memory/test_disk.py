"""Reading records: right bytes, past the page cache, errors that name the record."""

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from foregate.checkpoint.store import ExpertKey, Store
from foregate.memory import disk
from foregate.memory.disk import DiskReader
from foregate.memory.slots import SlotMemory
from foregate.schedule import Load


@pytest.fixture
def opened(store: Callable[[str], Path]) -> Store:
    return Store(store("mixtral"))


@pytest.fixture
def memory(opened: Store) -> SlotMemory:
    return SlotMemory(opened.num_experts, opened.record_bytes)


@pytest.fixture
def reader(opened: Store, memory: SlotMemory) -> Iterator[DiskReader]:
    reader = DiskReader(opened, memory, readers=2)
    yield reader
    reader.close()


def test_every_record_lands_in_its_slot(opened: Store, memory: SlotMemory, reader: DiskReader) -> None:
    check_all_records(opened, memory, reader)


def test_slots_are_page_aligned(memory: SlotMemory) -> None:
    assert memory.record(0, 4096).data_ptr() % 4096 == 0
    assert memory.slot_bytes % 4096 == 0


def test_direct_reads_leave_the_page_cache_alone(opened: Store, memory: SlotMemory, reader: DiskReader) -> None:
    if not reader.direct:
        pytest.skip("this file system refuses direct reads")
    fd = os.open(opened.experts_path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    before = cached_pages(opened.experts_path)
    read_all_records(opened, reader)
    assert cached_pages(opened.experts_path) <= before


def test_buffered_fallback_is_told_and_reads_the_same(
    opened: Store, memory: SlotMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open

    def refuse_direct(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse_direct)
    reader = DiskReader(opened, memory, readers=2)
    assert not reader.direct
    check_all_records(opened, memory, reader)
    reader.close()


def test_short_reads_go_on(opened: Store, memory: SlotMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(disk.os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:4096]], at))
    reader = DiskReader(opened, memory, readers=1)
    check_all_records(opened, memory, reader)
    reader.close()


def test_io_error_names_the_record(opened: Store, memory: SlotMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = DiskReader(opened, memory, readers=1)

    def fail(*arguments: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(disk.os, "preadv", fail)
    reader.submit(Load((1, 3), 0))
    finished = reader.wait()
    assert finished.key == (1, 3)
    assert opened.record_name((1, 3)) in str(finished.error)
    assert "Input/output error" in str(finished.error)
    reader.close()


def test_closing_twice_is_fine(opened: Store, memory: SlotMemory) -> None:
    reader = DiskReader(opened, memory, readers=2)
    reader.close()
    reader.close()


def check_all_records(opened: Store, memory: SlotMemory, reader: DiskReader) -> None:
    expected, slots = load_file(opened.experts_path), read_all_records(opened, reader)
    assert len(slots) == opened.num_experts
    for key, slot in slots.items():
        record = expected[opened.record_name(key)]
        assert torch.equal(memory.record(slot, len(record)), record)


def read_all_records(opened: Store, reader: DiskReader) -> dict[ExpertKey, int]:
    """Load every record into a slot of its own: where each went."""
    keys = [(n, e) for n, layer in enumerate(opened.layers) for e in range(layer.num_experts)]
    slots = {key: slot for slot, key in enumerate(reversed(keys))}
    for key, slot in slots.items():
        reader.submit(Load(key, slot))
    finished = [reader.wait() for _ in keys]
    assert reader.in_flight == 0
    assert not any(load.error for load in finished)
    assert {load.key for load in finished} == set(keys)
    return slots


def cached_pages(path: Path) -> int:
    """Pages of the file that the kernel holds."""
    size = path.stat().st_size
    block = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)  # a map; no page is touched
    flags = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(block.data_ptr()), ctypes.c_size_t(size), flags) == 0
    return sum(flag & 1 for flag in flags)
