"""What of a time line is shown, and where: a stretch of tokens, and loads in lanes so that none lies over another."""

from collections.abc import Iterable
from statistics import median
from typing import Any

from foregate.report.read import RunReport
from foregate.report.timeline import PASSES


def window(report: RunReport, tokens: int, first: int | None) -> tuple[int, int] | None:
    """(start, end) in microseconds of so many decoded tokens.

    From the `first` one that was kept (from 0); None if there are not so many from there on. Without `first`, those that
    took as long as such a stretch does in the median; fewer if there are not so many, None if there is no token.
    """
    starts = [row["start"] for row in report.timeline[PASSES] if row["tokens"] == 1]
    if first is not None:
        return (starts[first], starts[first + tokens]) if first + tokens < len(starts) else None
    tokens = min(tokens, len(starts) - 1)
    if tokens < 1:
        return None
    stretches = list(zip(starts, starts[tokens:], strict=False))
    usual = median(end - start for start, end in stretches)
    return min(stretches, key=lambda stretch: abs(stretch[1] - stretch[0] - usual))


def lanes(loads: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of the time line's loads; in a lane each begins when the one before has ended. As few lanes as possible."""
    found: list[list[dict[str, Any]]] = []
    for load in sorted(loads, key=lambda load: (load["start"], load["duration"])):
        lane = next((lane for lane in found if lane[-1]["start"] + lane[-1]["duration"] <= load["start"]), None)
        if lane is None:
            found.append(lane := [])
        lane.append(load)
    return found
