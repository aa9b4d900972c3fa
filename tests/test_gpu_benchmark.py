"""The dry run of benchmarks/gpu.py: every step it would take on a card, on the simulated link."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks/gpu.py"
SMALL = [
    "--models",
    "mixtral",
    "--bits",
    "4",
    "--memory",
    "25%",
    "--tokens",
    "2",
    "--repeats",
    "1",
    "--prompt-tokens",
    "24",
]


def test_dry_run(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(SCRIPT),
        "--dry-run",
        *SMALL,
        "--work",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    written, page = sorted((tmp_path / "out").iterdir())
    rows = json.loads(written.read_text())["rows"]
    steps = {row["step"] for row in rows}
    assert steps == {
        "bandwidth",
        "kernels",
        *(f"{step} mixtral 4" for step in ("check", "model", "decode", "prompt")),
        "accelerate mixtral",
    }
    exact = [row for row in rows if row.get("exact")]
    assert len(exact) == 3 and all(row["same_bits"] for row in exact)
    decoded = {row["name"]: row for row in rows if row["step"] == "decode mixtral 4"}
    assert decoded["all resident"]["bytes_per_token"] == 0
    assert decoded["clairvoyant"]["hit_rate"] > decoded["lru"]["hit_rate"]
    assert decoded["lookahead+host"]["aims_met"].keys() == {"mixtral-offloading-code x 2.0", "mixtral-offloading x 1.6"}
    assert "dry run" in page.read_text() and page.read_text().count("| decode mixtral 4 |") == len(decoded)
