"""The time line against the counters, and the trace that Perfetto reads."""

import json
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from foregate.report.chrome import chrome_trace
from foregate.report.layout import lanes, window
from foregate.report.prefetches import KINDS
from foregate.report.read import read_report

POLICIES = ["lru", "lookahead"]


@pytest.mark.parametrize("policy", POLICIES)
def test_events_add_up_to_the_counts(run: Callable[[str], Any], policy: str) -> None:
    report = run(policy).report
    timeline, layers = report["timeline"], report["by_layer"]
    assert timeline["events"] == sum(len(timeline[kind]) for kind in timeline["columns"])  # none was lost
    assert [tokens for _, tokens in timeline["passes"]] == [12] + [1] * 23
    for index, counts in enumerate(layers):
        stalls = [duration for _, duration, layer in timeline["stalls"] if layer == index]
        assert sum(stalls) == pytest.approx(counts["stall_seconds"] * 1e6, abs=len(stalls) + 1)
        computed = [(duration, experts) for _, duration, layer, experts in timeline["experts"] if layer == index]
        assert len(computed) == counts["kernel_calls"]
        assert sum(experts for _, experts in computed) == counts["experts_computed"]
        loads = [kind for _, _, layer, _, kind in timeline["loads"] if layer == index]
        assert loads.count("late") == counts["prefetches"]["late"]
        assert len(loads) - loads.count("demand") == counts["prefetches"]["started"]
        assert set(loads) <= set(KINDS)
    assert bool(timeline["gates"]) == (policy == "lookahead")


@pytest.mark.parametrize("policy", POLICIES)
def test_the_trace_is_one_that_perfetto_reads(
    run: Callable[[str], Any], report_file: Callable[[str], Path], policy: str
) -> None:
    """The form that Chrome's trace event format asks for; spans of one thread one after the other."""
    trace = json.loads(json.dumps(chrome_trace(read_report(report_file(policy)))))
    threads: dict[int, list[dict]] = defaultdict(list)
    names = {}
    for event in trace["traceEvents"]:
        assert event["ph"] in ("X", "M")
        assert event["pid"] == 1
        if event["ph"] == "X":
            assert isinstance(event["ts"], int) and isinstance(event["dur"], int) and event["dur"] >= 0
            assert event["name"]
            threads[event["tid"]].append(event)
        elif event["name"] == "thread_name":
            names[event["tid"]] = event["args"]["name"]
    assert threads.keys() <= names.keys()
    assert {"tokens", "experts and gates", "stalls", "loads 1"} <= set(names.values())
    for spans in threads.values():
        spans.sort(key=lambda span: (span["ts"], span["dur"]))
        assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in pairwise(spans))
    by_name = {names[thread]: spans for thread, spans in threads.items()}
    stalled = sum(counts["stall_seconds"] for counts in run(policy).report["by_layer"])
    assert sum(span["dur"] for span in by_name["stalls"]) == pytest.approx(1e6 * stalled, rel=0.01)
    at_work = sorted([*by_name["experts and gates"], *by_name["stalls"]], key=lambda span: (span["ts"], span["dur"]))
    assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in pairwise(at_work))


def test_lanes() -> None:
    spans = [(0, 10), (2, 3), (5, 5), (6, 1), (10, 4)]
    laid = lanes({"start": start, "duration": duration} for start, duration in spans)
    assert [[(load["start"], load["duration"]) for load in lane] for lane in laid] == [
        [(0, 10), (10, 4)],
        [(2, 3), (5, 5)],
        [(6, 1)],
    ]


def test_the_window_is_a_stretch_of_median_length(report_file: Callable[[str], Path]) -> None:
    report = read_report(report_file("lru"))
    starts = [row["start"] for row in report.timeline["passes"]][1:]  # without the prompt
    lengths = sorted(end - start for start, end in zip(starts, starts[3:], strict=False))
    start, end = window(report, 3, None)
    assert end == starts[starts.index(start) + 3]
    assert end - start in lengths[len(lengths) // 2 - 1 : len(lengths) // 2 + 1]
    assert window(report, 2, 4) == (starts[4], starts[6])
    assert window(report, 2, 22) is None
    assert window(report, 99, None) == (starts[0], starts[-1])  # all there are
    for few in (1, 0):
        del report.timeline["passes"][1 + few :]
        assert window(report, 2, None) is None
