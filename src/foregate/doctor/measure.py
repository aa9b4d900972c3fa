"""How many bytes a second memory, disk and link move here: short measurements, bounded in time and size."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from foregate.config import DoctorConfig, EngineConfig
from foregate.memory.pages import allocate

BLOCK = 1 << 20  # bytes of a read, as the engine's own
PAGE = 4096


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second of long transfers, and seconds of the shortest one."""

    bytes_per_second: float
    latency_seconds: float
    note: str = ""  # how it was measured


def memory_bandwidth() -> Bandwidth:
    """Reading memory with PyTorch's threads, as a plain sum of float32 does."""
    values = torch.frombuffer(allocate(DoctorConfig.memory_bytes), dtype=torch.float32)
    values.fill_(1)
    seconds = _seconds(lambda: values.sum(), DoctorConfig.memory_seconds)
    return Bandwidth(values.nbytes / seconds, 0.0, f"{torch.get_num_threads()} threads")


def disk_bandwidth(folder: Path, existing: Path | None = None) -> Bandwidth:
    """Direct reads of 1 MiB by as many threads as the engine has readers; the latency is that of one page.

    existing: a file to read; without one, or if it is small, a temporary file in `folder` is written and removed. Raises
    OSError where neither can be read.
    """
    if existing is not None and existing.stat().st_size >= 16 * BLOCK:
        return _read_file(existing)
    with _scratch(folder) as file:
        return _read_file(file)


def link_bandwidth() -> tuple[Bandwidth, Bandwidth]:
    """(host to device from pinned memory, the device's own memory) of the first CUDA card."""
    host = torch.empty(DoctorConfig.link_bytes, dtype=torch.uint8, pin_memory=True)
    device, values = host.cuda(), torch.ones(DoctorConfig.link_bytes // 4, device="cuda")
    page = torch.empty(PAGE, dtype=torch.uint8, pin_memory=True)

    def synchronised(work: Callable[[], object]) -> Callable[[], None]:
        def call() -> None:
            work()
            torch.cuda.synchronize()

        return call

    copy = _seconds(synchronised(lambda: device.copy_(host, non_blocking=True)), DoctorConfig.memory_seconds)
    short = _seconds(
        synchronised(lambda: device[:PAGE].copy_(page, non_blocking=True)), DoctorConfig.memory_seconds / 4
    )
    own = _seconds(synchronised(values.sum), DoctorConfig.memory_seconds)
    return Bandwidth(host.nbytes / copy, short, "pinned"), Bandwidth(values.nbytes / own, 0.0, "sum of float32")


def open_direct(file: Path) -> tuple[int, bool]:
    """(file descriptor, whether it reads past the page cache). Raises OSError."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return os.open(file, os.O_RDONLY), False
    try:  # some file systems open the file and refuse the first read
        os.preadv(fd, [allocate(PAGE)], 0)
    except OSError:
        os.close(fd)
        return os.open(file, os.O_RDONLY), False
    return fd, True


def _read_file(file: Path) -> Bandwidth:
    fd, direct = open_direct(file)
    try:
        blocks = max(os.fstat(fd).st_size // BLOCK, 1)
        buffers = [allocate(BLOCK) for _ in range(EngineConfig.readers)]
        latency = _latency(fd, blocks)
        deadline = time.perf_counter() + DoctorConfig.disk_seconds

        def read(reader: int) -> int:
            done = 0
            for block in range(reader, min(blocks, DoctorConfig.disk_bytes // BLOCK), EngineConfig.readers):
                done += os.preadv(fd, [buffers[reader]], block * BLOCK)
                if not direct:
                    os.posix_fadvise(fd, block * BLOCK, BLOCK, os.POSIX_FADV_DONTNEED)
                if time.perf_counter() > deadline:
                    break
            return done

        start = time.perf_counter()
        with ThreadPoolExecutor(EngineConfig.readers) as pool:
            done = sum(pool.map(read, range(EngineConfig.readers)))
        seconds = time.perf_counter() - start
    finally:
        os.close(fd)
    return Bandwidth(done / seconds, latency, "direct reads" if direct else "reads through the page cache")


def _latency(fd: int, blocks: int) -> float:
    """The median time of single pages far from each other."""
    buffer, times = allocate(PAGE), []
    step = max(blocks // DoctorConfig.latency_reads, 1)
    for block in range(0, blocks, step)[: DoctorConfig.latency_reads]:
        start = time.perf_counter()
        os.preadv(fd, [buffer], block * BLOCK)
        times.append(time.perf_counter() - start)
    return median(times)


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A file of random bytes on the disk, not only in memory; removed at the end."""
    fd, name = tempfile.mkstemp(prefix=".foregate-doctor-", dir=folder)
    try:
        block, deadline = os.urandom(BLOCK), time.perf_counter() + DoctorConfig.disk_seconds
        for _ in range(DoctorConfig.scratch_bytes // BLOCK):
            os.write(fd, block)
            if time.perf_counter() > deadline:
                break
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        yield Path(name)
    finally:
        os.close(fd)
        os.unlink(name)


def _seconds(call: Callable[[], object], at_most: float) -> float:
    """The median time of a call, repeated for a while."""
    call()
    times, end = [], time.perf_counter() + at_most
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)
