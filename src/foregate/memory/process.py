"""This process's memory as the kernel counts it."""

import contextlib
import ctypes
import gc
import resource
from pathlib import Path


def peak_memory_bytes() -> int:
    """The most memory this process ever held resident, in bytes.

    From the process's own high-water mark: `getrusage` would count what a parent held before it started us.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak_memory() -> None:
    """Let `peak_memory_bytes` count from now on, where the kernel allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident_bytes() -> int:
    """The memory that this process holds resident now, in bytes."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, ValueError):
        return peak_memory_bytes()


def return_unused_memory() -> None:
    """Give memory that is no longer used back to the system, where the C library can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
