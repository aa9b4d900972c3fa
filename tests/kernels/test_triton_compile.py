"""The Triton kernels compile for real cards, without one: NVIDIA's assembler comes with Triton."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "triton_compiled.py"
KERNELS = {"decode_up", "decode_down", "decode_down_sum", "grouped_up", "grouped_down"}


def compiled(tmp_path: Path, *arguments: str) -> list[dict]:
    file = tmp_path / "compiled.json"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run([sys.executable, SCRIPT, *arguments, "--out", file], env=environment, check=True)
    return json.loads(file.read_text())["kernels"]


def flushing(kernels: list[dict]) -> list[dict]:
    """Decode kernels that would take the codes, which they read as subnormal numbers, for zeros."""
    return [row for row in kernels if row["kernel"].startswith("decode") and row["flushing_fma"]]


def test_turing(tmp_path: Path) -> None:
    kernels = compiled(tmp_path, "--capability", "75", "--shape", "qwen3", "--bits", "4")
    assert {row["kernel"] for row in kernels} == KERNELS
    assert not any(row["stack"] for row in kernels), "registers are spilled"
    assert not flushing(kernels)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["75", "80", "86", "89", "90"])
def test_every_card_shape_and_width(tmp_path: Path, capability: str) -> None:
    kernels = compiled(tmp_path, "--capability", capability)
    assert len(kernels) == 4 * 4 * len(KERNELS)
    spilled = [row for row in kernels if row["stack"] > 16]
    # Turing has no tensor cores that Triton uses: its products of 8-bit tiles spill a little.
    assert all(row["capability"] == 75 and row["bits"] == 8 and row["stack"] <= 256 for row in spilled)
    assert not flushing(kernels)
    assert all(row["shared"] <= 48 << 10 for row in kernels)  # what every card grants without being asked
