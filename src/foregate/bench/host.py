"""What else the machine was doing while something was timed."""

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")
TICK = os.sysconf("SC_CLK_TCK")
IDLE = (3, 4)  # columns of /proc/stat's first line: idle and waiting for the disk
GUEST = 8  # this column and the next are counted in others already


class ForeignLoad:
    """The share of all cores that other programs, and other guests of the host, took since this was made."""

    def __init__(self) -> None:
        self._start = _now()

    def share(self) -> float | None:
        """From 0 to 1; None where the kernel does not tell."""
        if self._start is None:
            return None
        seconds, busy, own = (after - before for after, before in zip(_now(), self._start, strict=True))
        cores = os.cpu_count() or 1
        return min(max((busy - own) / (seconds * cores), 0.0), 1.0) if seconds else 0.0


def _now() -> tuple[float, float, float] | None:
    """(clock, seconds in which cores were busy, seconds of them by this process)."""
    try:
        counts = STAT.read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    busy = sum(int(count) for column, count in enumerate(counts[:GUEST]) if column not in IDLE) / TICK
    times = os.times()
    return time.perf_counter(), busy, times.user + times.system
