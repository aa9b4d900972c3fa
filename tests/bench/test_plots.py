"""Figures are drawn for numbers and for spreads, whatever the settings are called."""

from pathlib import Path

import pytest

from foregate.bench.plots import plot_speeds

pytest.importorskip("matplotlib")


def test_speeds(tmp_path: Path) -> None:
    spread = {"median": 2.0, "least": 1.0, "most": 4.0}
    rows = [
        {"policy": "lru", "memory": memory, "link_bandwidth": link, "tokens_per_second": 1.0}
        for memory in ("25%", "50%")
        for link in (None, 4e6, 1e9, 2e9, 4e9)
    ]
    rows += [{"name": "+ alignment", "memory": "50%", "link_bandwidth": 1e9, "tokens_per_second": spread}]
    plot_speeds(rows, tmp_path / "speeds.svg", "a note")
    drawn = (tmp_path / "speeds.svg").read_text()
    for text in ("the disk as it is", "4 MB/s", "1 GB/s", "2 GB/s", "4 GB/s", "lru", "a note"):
        assert f"<!-- {text} -->" in drawn
