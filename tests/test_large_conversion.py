"""A small run of benchmarks/large_conversion.py: killed conversions resume to the same bytes, in bounded memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[1] / "benchmarks/large_conversion.py"


def test_killed_conversions_resume_to_the_same_bytes(tmp_path: Path) -> None:
    options = ["--gigabytes", "0.5", "--kills", "3", "--folder", str(tmp_path), "--out", str(tmp_path / "figures.json")]
    subprocess.run([sys.executable, str(SCRIPT), *options], check=False)  # fails too when a kill came too late
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["same_bytes"]
    assert figures["memory_within_bar"]
    assert figures["kills"] >= 1
