"""Options that hold several values, sizes or times."""

import re

from foregate.errors import ForegateError
from foregate.sizes import parse_bytes

TIME = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(us|ms|s)")
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def split_list(text: str, option: str) -> list[str]:
    """The values of "a,b,c", each once. Raises ForegateError when there is none."""
    values = list(dict.fromkeys(value.strip() for value in text.split(",") if value.strip()))
    if not values:
        raise ForegateError(f"{option} is empty: name at least one value")
    return values


def parse_bandwidths(text: str, option: str) -> list[float]:
    """Bytes/s from "250MB,1GB", "1GB/s". Raises ForegateError."""
    values = [
        float(parse_bytes(value.removesuffix("/s"), option, "bytes a second such as 250MB or 1GB"))
        for value in split_list(text, option)
    ]
    if not all(values):
        raise ForegateError(f"{option} {text}: a link moves at least one byte a second")
    return values


def parse_seconds(text: str, option: str) -> float:
    """Seconds from "50us", "1.5ms" or "2s". Raises ForegateError."""
    match = TIME.fullmatch(text.strip())
    if not match:
        raise ForegateError(f"{option} {text} is not a time: write it as 50us, 1.5ms or 2s")
    return float(match[1]) * SECONDS[match[2]]


def format_seconds(seconds: float) -> str:
    """As `parse_seconds` reads it."""
    for unit in ("s", "ms", "us"):
        if seconds >= SECONDS[unit]:
            return f"{seconds / SECONDS[unit]:g}{unit}"
    return f"{seconds * 1e6:g}us"


def format_bandwidth(bandwidth: float | None) -> str:
    """For a person. None is a link without pacing."""
    if bandwidth is None:
        return "unpaced"
    return f"{bandwidth / 1e9:g} GB/s" if bandwidth >= 1e9 else f"{bandwidth / 1e6:g} MB/s"


def link_settings(bandwidth: str | None, latency: str | None) -> dict[str, float]:
    """What the options of the link say to `foregate.load`; nothing where they are not given. Raises ForegateError."""
    settings = {}
    if bandwidth is not None:
        settings["link_bandwidth"] = parse_bandwidths(bandwidth, "--link-bandwidth")[0]
    if latency is not None:
        settings["link_latency"] = parse_seconds(latency, "--link-latency")
    return settings
