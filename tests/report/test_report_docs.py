"""docs/report.md names every field of a report, and what it shows can be drawn from the reports it names."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from foregate.config import ReportConfig
from foregate.report import REPORT_VERSION
from foregate.report.read import read_report

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/report.md").read_text()


def test_every_field_is_named(run: Callable[[str], Any]) -> None:
    named = set(re.findall(r"`(\w+)`", PAGE))
    assert set(fields(run("lookahead").report)) <= named
    assert f"| `report_version` | {REPORT_VERSION};" in PAGE
    assert f"the last {ReportConfig.events:,} events" in PAGE


def fields(report: Any) -> Iterator[str]:
    if isinstance(report, dict):
        for name, value in report.items():
            yield name
            yield from fields(value)
    elif isinstance(report, list):
        for value in report:
            yield from fields(value)


def test_the_reports_that_the_page_shows_can_be_read() -> None:
    paths = set(re.findall(r"benchmarks/results/[\w-]+\.json", PAGE))
    assert len(paths) == 2
    for path in paths:
        report = read_report(ROOT / path)
        assert report.new_tokens == 128
        assert report.timeline is not None


@pytest.mark.parametrize(("name", "policy"), [("auto", "lookahead"), ("lru", "lru")])
def test_the_reports_that_the_page_shows_have_the_fields_of_one_made_today(
    run: Callable[[str], Any], name: str, policy: str
) -> None:
    shown = json.loads((ROOT / f"benchmarks/results/report-{name}.json").read_text())
    today = run(policy).report | {"settings": shown["settings"]}  # they are as given
    assert set(paths(shown)) == set(paths(today))


def paths(value: Any, path: str = "") -> Iterator[str]:
    """Every field of a report, with those it lies in: memory.planned.slots, by_layer[].hits."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield f"{path}.{name}"
            yield from paths(inner, f"{path}.{name}")
    elif isinstance(value, list):
        for inner in value:
            yield from paths(inner, f"{path}[]")
