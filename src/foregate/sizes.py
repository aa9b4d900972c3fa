"""Numbers of bytes as people write them."""

import re

from foregate.errors import ForegateError

MIB, GIB = 2**20, 2**30
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": MIB, "GIB": GIB}
SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")


def parse_bytes(text: str, option: str, expected: str = "bytes such as 8GiB or 500MB") -> int:
    """Bytes from "8GiB", "500MB" or "123456". Raises ForegateError, which names the option, when it is none of these."""
    match = SIZE.fullmatch(text.strip())
    if not match or match[2].upper() not in UNITS:
        raise ForegateError(f"{option} {text} is not a size: write {expected}")
    return int(min(float(match[1]), 1e18) * UNITS[match[2].upper()])


def format_bytes(nbytes: float) -> str:
    """For a person: "11.4 GiB", "717 MiB", "0.3 MiB"."""
    if nbytes >= GIB:
        return f"{nbytes / GIB:.2f} GiB"
    return f"{nbytes / MIB:.0f} MiB" if nbytes >= 10 * MIB else f"{nbytes / MIB:.1f} MiB"


def whole_mib(nbytes: int) -> str:
    """As `parse_bytes` reads it, rounded up: "718MiB"."""
    return f"{-(-nbytes // MIB)}MiB"
