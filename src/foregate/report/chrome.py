"""A time line as a trace for Perfetto (ui.perfetto.dev) or chrome://tracing: complete events, one thread a track.

The format: Chrome's "Trace Event Format", JSON object form. Times in microseconds.
"""

from collections.abc import Iterator
from typing import Any

from foregate.report.layout import lanes
from foregate.report.read import RunReport
from foregate.report.timeline import EXPERTS, GATES, LOADS, PASSES, STALLS

PROCESS = 1
TOKENS, COMPUTE, STALL, LINK = 1, 2, 3, 4  # threads; further lanes of the link follow


def chrome_trace(report: RunReport) -> dict[str, Any]:
    """The trace as JSON takes it. The report must have a time line."""
    return {
        "traceEvents": [*_names(report), *_spans(report)],
        "displayTimeUnit": "ms",
        "otherData": {"store": report.store, "policy": report.policy, "memory": report.memory},
    }


def _names(report: RunReport) -> Iterator[dict[str, Any]]:
    yield _metadata("process_name", 0, name=f"foregate {report.name}: {report.policy}, {report.memory}")
    threads = {TOKENS: "tokens", COMPUTE: "experts and gates", STALL: "stalls"}
    for lane in range(len(lanes(report.timeline[LOADS]))):
        threads[LINK + lane] = f"loads {lane + 1}"
    for thread, name in threads.items():
        yield _metadata("thread_name", thread, name=name)
        yield _metadata("thread_sort_index", thread, sort_index=thread)


def _spans(report: RunReport) -> Iterator[dict[str, Any]]:
    rows = report.timeline
    for row, after in zip(rows[PASSES], rows[PASSES][1:], strict=False):
        name = "token" if row["tokens"] == 1 else f"{row['tokens']} tokens"
        yield _span(TOKENS, name, {**row, "duration": after["start"] - row["start"]})
    for row in rows[EXPERTS]:
        yield _span(COMPUTE, f"layer {row['layer']}", row, "experts")
    for row in rows[GATES]:
        yield _span(COMPUTE, "gate", row)
    for row in rows[STALLS]:
        yield _span(STALL, f"stall in layer {row['layer']}", row, "layer")
    for lane, loads in enumerate(lanes(rows[LOADS])):
        for row in loads:
            yield _span(LINK + lane, f"{row['kind']} {row['layer']}.{row['expert']}", row, "layer", "expert", "kind")


def _span(thread: int, name: str, row: dict[str, Any], *arguments: str) -> dict[str, Any]:
    return {
        "ph": "X",
        "pid": PROCESS,
        "tid": thread,
        "name": name,
        "ts": row["start"],
        "dur": row["duration"],
        "args": {argument: row[argument] for argument in arguments},
    }


def _metadata(what: str, thread: int, **arguments: Any) -> dict[str, Any]:
    return {"ph": "M", "pid": PROCESS, "tid": thread, "name": what, "args": arguments}
