"""How much memory there is to be had."""

import os
from dataclasses import dataclass
from pathlib import Path

from foregate.memory.process import resident_bytes

UNLIMITED = 1 << 60  # version 1 of cgroups writes a number near 2**63 where there is no limit


@dataclass(frozen=True)
class HostMemory:
    """The host's memory, in bytes, as this process may use it."""

    total: int
    free: int  # what the process may still come to hold, and what it holds already
    cgroup_limit: int | None  # None: no limit


def host_memory() -> HostMemory:
    """The machine's memory, or what the process's control group leaves of it."""
    own, total = resident_bytes(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = _available(total) + own
    limit, used = _cgroup()
    if limit is None:
        return HostMemory(total, min(free, total), None)
    return HostMemory(total, min(free, total, limit - used + own), limit)


def _available(total: int) -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return total


def _cgroup() -> tuple[int | None, int]:
    """(limit, bytes in use that cannot be dropped) of the tightest control group that this process is in."""
    tightest: tuple[int | None, int] = None, 0
    for folder, names in _cgroup_folders():
        limit, used = (_number(folder / name) for name in names)
        if limit is None or limit >= UNLIMITED or used is None:
            continue
        used = max(used - _page_cache(folder / "memory.stat"), 0)
        if tightest[0] is None or limit - used < tightest[0] - tightest[1]:
            tightest = limit, used
    return tightest


def _cgroup_folders() -> list[tuple[Path, tuple[str, str]]]:
    """Folders of this process's memory groups and their parents, with the names of limit and use in them."""
    root, found = Path("/sys/fs/cgroup"), []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, names = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        folder = base / path.strip("/")
        found += [(parent, names) for parent in (folder, *folder.parents) if parent.is_relative_to(base)]
    return found


def _page_cache(stat: Path) -> int:
    """Bytes of files in memory, which the kernel drops when others are needed."""
    try:
        fields = dict(line.split() for line in stat.read_text().splitlines())
        return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))
    except (OSError, ValueError):
        return 0


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
