"""Loads laid out in lanes, so that none lies over another."""

from collections.abc import Iterable
from typing import Any


def lanes(loads: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of the time line's loads; in a lane each begins when the one before has ended. As few lanes as possible."""
    found: list[list[dict[str, Any]]] = []
    for load in sorted(loads, key=lambda load: (load["start"], load["duration"])):
        lane = next((lane for lane in found if lane[-1]["start"] + lane[-1]["duration"] <= load["start"]), None)
        if lane is None:
            found.append(lane := [])
        lane.append(load)
    return found
