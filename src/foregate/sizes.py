"""Numbers of bytes as people write them."""

import re

from foregate.errors import ForegateError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")


def parse_bytes(text: str, option: str, expected: str = "bytes such as 8GiB or 500MB") -> int:
    """Bytes from "8GiB", "500MB" or "123456". Raises ForegateError, which names the option, when it is none of these."""
    match = SIZE.fullmatch(text.strip())
    if not match or match[2].upper() not in UNITS:
        raise ForegateError(f"{option} {text} is not a size: write {expected}")
    return int(min(float(match[1]), 1e18) * UNITS[match[2].upper()])


def format_bytes(nbytes: int) -> str:
    """For a person: "2.8 GiB", "11.2 MiB", "0.5 KiB"."""
    units = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
    unit, size = next((pair for pair in units if nbytes >= pair[1]), units[-1])
    return f"{nbytes / size:,.1f} {unit}"
