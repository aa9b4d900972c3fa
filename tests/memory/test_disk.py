"""Reading records: right bytes, past the page cache, errors that name the record."""

import ctypes
import errno
import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from foregate.checkpoint.store import ExpertKey, Store
from foregate.errors import ForegateError
from foregate.memory import disk
from foregate.memory.disk import ExpertsFile
from foregate.memory.slots import SlotMemory

KEY = (1, 3)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "RETRY_PAUSES", (0.0, 0.001, 0.002))


@pytest.fixture
def opened(store: Callable[[str], Path]) -> Store:
    return Store(store("mixtral"))


@pytest.fixture
def own(opened: Store, tmp_path: Path) -> Store:
    """A copy of the store that a test may change."""
    return Store(shutil.copytree(opened.path, tmp_path / "store"))


@pytest.fixture
def memory(opened: Store) -> SlotMemory:
    return SlotMemory(opened.num_experts, opened.record_bytes)


@pytest.fixture
def file(opened: Store) -> Iterator[ExpertsFile]:
    file = ExpertsFile(opened)
    yield file
    file.close()


def test_every_record_is_read_as_it_was_written(opened: Store, memory: SlotMemory, file: ExpertsFile) -> None:
    check_all_records(opened, memory, file)


def test_a_part_of_a_record(opened: Store, memory: SlotMemory, file: ExpertsFile) -> None:
    file.read(KEY, 4096, memory.buffer(0, 8192))
    assert torch.equal(memory.record(0, 8192), expected_records(opened)[KEY][4096 : 4096 + 8192])


def test_slots_are_page_aligned(memory: SlotMemory) -> None:
    assert memory.record(0, 4096).data_ptr() % 4096 == 0
    assert memory.slot_bytes % 4096 == 0


def test_direct_reads_leave_the_page_cache_alone(own: Store, memory: SlotMemory) -> None:
    file = ExpertsFile(own)
    if not file.direct:
        pytest.skip("this file system refuses direct reads")
    drop_cached_pages(own.experts_path)
    read_all_records(own, memory, file)
    file.close()
    assert cached_pages(own.experts_path) == 0


@pytest.mark.parametrize("refused", ["open", "read"])
def test_buffered_fallback_is_told_reads_the_same_and_cleans_up(
    own: Store, memory: SlotMemory, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    if cached_pages_of_a_new_file(own.path / "probe"):
        pytest.skip("this file system lives in the page cache")
    expected = expected_records(own)
    drop_cached_pages(own.experts_path)
    refuse_direct(monkeypatch, refused)
    file = ExpertsFile(own)
    assert not file.direct
    read_all_records(own, memory, file)
    assert cached_pages(own.experts_path) == 0
    file.close()
    for slot, record in enumerate(expected.values()):
        assert torch.equal(memory.record(slot, len(record)), record)


def test_a_bad_sector_is_no_refusal_of_direct_reads(opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_reads(monkeypatch, attempts=1)
    file = ExpertsFile(opened)
    assert file.direct
    file.close()


@pytest.mark.parametrize("nbytes", [1536, 4096, 6000])
def test_short_reads_go_on(
    opened: Store, memory: SlotMemory, file: ExpertsFile, monkeypatch: pytest.MonkeyPatch, nbytes: int
) -> None:
    """Every second read is short; a direct read goes on where its alignment allows."""
    real, calls = os.preadv, [0]

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        count, calls[0] = real(fd, buffers, offset), calls[0] + 1
        if calls[0] % 2 and count > nbytes:
            buffers[0][nbytes:count] = bytes(count - nbytes)  # what was not read is not there
            return nbytes
        return count

    monkeypatch.setattr(disk.os, "preadv", short)
    check_all_records(opened, memory, file)


@pytest.mark.parametrize("attempts", [1, 3])
def test_a_failing_read_is_tried_again(
    opened: Store, memory: SlotMemory, file: ExpertsFile, monkeypatch: pytest.MonkeyPatch, attempts: int
) -> None:
    fail_reads(monkeypatch, attempts)
    check_all_records(opened, memory, file)


def test_a_read_that_fails_for_good_names_file_record_cause_and_mend(
    opened: Store, memory: SlotMemory, file: ExpertsFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fail_reads(monkeypatch, attempts=1000)
    with pytest.raises(ForegateError, match="foregate verify") as caught:
        file.read(KEY, 0, memory.buffer(0, 4096))
    assert str(opened.experts_path) in str(caught.value) and opened.record_name(KEY) in str(caught.value)
    assert "Input/output error" in str(caught.value)
    assert len(calls) == 4  # bounded


def test_the_pauses_between_attempts_grow(
    memory: SlotMemory, file: ExpertsFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.undo()
    fail_reads(monkeypatch, attempts=1000)
    monkeypatch.setattr(time, "sleep", pauses.append)
    with pytest.raises(ForegateError):
        file.read(KEY, 0, memory.buffer(0, 4096))
    assert len(pauses) == 3 and pauses == sorted(set(pauses)) and sum(pauses) < 1


def test_a_file_cut_short_is_an_error(own: Store, memory: SlotMemory) -> None:
    file = ExpertsFile(own)
    offset, nbytes = own.location(KEY)
    os.truncate(own.experts_path, offset + nbytes - 5000)
    with pytest.raises(ForegateError, match="the file ended early") as caught:
        file.read(KEY, 0, memory.buffer(0, nbytes))
    assert own.record_name(KEY) in str(caught.value)
    file.close()


def test_a_missing_file_is_a_clear_error(own: Store) -> None:
    own.experts_path.unlink()
    with pytest.raises(ForegateError, match="cannot be opened .No such file"):
        ExpertsFile(own)


def test_an_untouched_file_costs_no_hashing(
    opened: Store, memory: SlotMemory, file: ExpertsFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(disk.hashlib, "sha256")
    file.check(KEY, memory.buffer(0, opened.location(KEY)[1]))  # not even the record, but nobody looks


def test_once_the_file_has_changed_every_record_is_verified(own: Store, memory: SlotMemory) -> None:
    file = ExpertsFile(own)
    overwrite(own, own.location(KEY)[0] + 100, b"\x17\x2a")
    with pytest.raises(ForegateError, match="damaged.*foregate verify") as caught:
        read_and_check(own, memory, file, KEY)
    assert own.record_name(KEY) in str(caught.value)
    read_and_check(own, memory, file, (0, 0))  # this one is as it was
    original = Path(own.experts_path).stat()
    os.utime(own.experts_path, ns=(original.st_atime_ns, own.experts_version[2]))  # as if nothing had happened
    with pytest.raises(ForegateError, match="damaged"):
        read_and_check(own, memory, file, KEY)
    file.close()


def test_identical_bytes_written_again_are_fine(own: Store, memory: SlotMemory) -> None:
    file = ExpertsFile(own)
    offset, nbytes = own.location(KEY)
    overwrite(own, offset, own.experts_path.read_bytes()[offset : offset + nbytes])
    read_and_check(own, memory, file, KEY)
    file.close()


def test_a_file_replaced_before_it_is_opened_is_noticed(own: Store, memory: SlotMemory) -> None:
    """Between opening the store and its experts file, with size and times kept."""
    content, before = bytearray(own.experts_path.read_bytes()), own.experts_path.stat()
    content[own.location(KEY)[0] + 5] ^= 1
    other = own.path / "other"
    other.write_bytes(content)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(own.experts_path)
    file = ExpertsFile(own)
    with pytest.raises(ForegateError, match="damaged"):
        read_and_check(own, memory, file, KEY)
    file.close()


# -- helpers ----------------------------------------------------------------------------------------------------------


def keys_of(store: Store) -> list[ExpertKey]:
    return [(n, e) for n, layer in enumerate(store.layers) for e in range(layer.num_experts)]


def expected_records(store: Store) -> dict[ExpertKey, torch.Tensor]:
    """Every record as the safetensors library reads it; copies, for a map of the file would keep its pages cached."""
    tensors = load_file(store.experts_path)
    return {key: tensors[store.record_name(key)].clone() for key in keys_of(store)}


def read_all_records(store: Store, memory: SlotMemory, file: ExpertsFile) -> None:
    """Read record after record into slot after slot."""
    for slot, key in enumerate(keys_of(store)):
        file.read(key, 0, memory.buffer(slot, store.location(key)[1]))


def check_all_records(store: Store, memory: SlotMemory, file: ExpertsFile) -> None:
    read_all_records(store, memory, file)
    for slot, record in enumerate(expected_records(store).values()):
        assert torch.equal(memory.record(slot, len(record)), record)


def read_and_check(store: Store, memory: SlotMemory, file: ExpertsFile, key: ExpertKey) -> None:
    buffer = memory.buffer(0, store.location(key)[1])
    file.read(key, 0, buffer)
    file.check(key, buffer)


def fail_reads(monkeypatch: pytest.MonkeyPatch, attempts: int) -> list[int]:
    """Have the next `attempts` reads fail; returns the list that collects the offsets of all reads."""
    real, calls = os.preadv, []

    def fail(fd: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(offset)
        if len(calls) <= attempts:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers, offset)

    monkeypatch.setattr(disk.os, "preadv", fail)
    return calls


def refuse_direct(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Have opening a file for direct reads fail, or the first read after it."""
    real_open, real_read = os.open, os.preadv
    direct: set[int] = set()

    def refuse_open(path: Path, flags: int, *rest: int) -> int:
        if where == "open" and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        fd = real_open(path, flags, *rest)
        (direct.add if flags & os.O_DIRECT else direct.discard)(fd)
        return fd

    def refuse_read(fd: int, buffers: list[memoryview], offset: int) -> int:
        if fd in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_read(fd, buffers, offset)

    monkeypatch.setattr(os, "open", refuse_open)
    monkeypatch.setattr(os, "preadv", refuse_read)


def overwrite(store: Store, offset: int, content: bytes) -> None:
    with store.experts_path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(content)


def drop_cached_pages(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def cached_pages_of_a_new_file(path: Path) -> int:
    path.write_bytes(bytes(1 << 16))
    drop_cached_pages(path)
    return cached_pages(path)


def cached_pages(path: Path) -> int:
    """Pages of the file that the kernel holds."""
    size = path.stat().st_size
    block = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)  # a map; no page is touched
    flags = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(block.data_ptr()), ctypes.c_size_t(size), flags) == 0
    return sum(flag & 1 for flag in flags)
