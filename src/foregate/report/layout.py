"""What of a time line is shown, and where: a stretch of tokens, and loads in lanes so that none lies over another."""

from collections.abc import Iterable
from statistics import median
from typing import Any

from foregate.report.read import RunReport
from foregate.report.timeline import PASSES


def window(report: RunReport, tokens: int, first: int | None) -> tuple[int, int] | None:
    """(start, end) in microseconds of so many decoded tokens, from the `first` one kept on (from 0), or, if that is None,
    those that took as long as such a stretch does in the median. None if the time line has not so many of them."""
    starts = [row["start"] for row in report.timeline[PASSES] if row["tokens"] == 1]
    stretches = list(zip(starts, starts[tokens:], strict=False))
    if first is not None:
        return stretches[first] if first < len(stretches) else None
    if not stretches:
        return None
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
