"""`foregate simulate` and `foregate bench policies` as a user meets them."""

import json
import sys
from pathlib import Path

import pytest

from foregate.cli.main import main
from foregate.cli.units import format_seconds, parse_bandwidths, parse_seconds
from foregate.errors import ForegateError


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["foregate", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


def test_simulate(
    demo_store: Path, demo_trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    options = ("--tokens", 24, "--warm-up", 4, "--memory", "25%,50%", "--link-bandwidth", "10MB", "--report", out)
    assert run(monkeypatch, "simulate", "--trace", demo_trace, "--gates", demo_store, *options) == 0
    printed = capsys.readouterr().out
    for text in ("25% of the experts (24 slots), 10 MB/s", "50% of the experts (48 slots)", "×clairv.", "lookahead"):
        assert text in printed
    found = json.loads(out.read_text())
    assert found["machine"]["record_bytes"] == 53248
    assert len(found["rows"]) == 2 * 6
    assert str(demo_trace) not in out.read_text()


def test_simulate_as_json(
    demo_trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    options = ("--tokens", 12, "--warm-up", 2, "--memory", "25%", "--policy", "lru", "--json", "--report", out)
    assert (
        run(monkeypatch, "simulate", "--trace", demo_trace, "--machine", "mixtral-8x7b-2bit-12gb-pcie3", *options) == 0
    )
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text())


def test_a_machine_that_is_not_here_says_so(
    demo_trace: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--tokens", 12, "--warm-up", 2, "--memory", "25%", "--policy", "lru")
    assert (
        run(monkeypatch, "simulate", "--trace", demo_trace, "--machine", "mixtral-8x7b-2bit-12gb-pcie3", *options) == 0
    )
    printed = capsys.readouterr().out
    assert printed.startswith("projected: times derived from RTX 3060's data sheet")
    assert "12 GB/s" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "name the link with --link-bandwidth"),
        (("--link-bandwidth", "1GB"), "name the size of an expert with --record-bytes"),
        (("--link-bandwidth", "fast", "--record-bytes", "1MB"), "--link-bandwidth fast is not a size"),
        (("--link-bandwidth", "0", "--record-bytes", "1MB"), "at least one byte a second"),
        (("--link-bandwidth", "1GB", "--record-bytes", "1MB", "--gate-time", "3"), "--gate-time 3 is not a time"),
        (("--machine", "laptop"), "unknown machine laptop"),
        (("--machine", "mixtral-8x7b-2bit-12gb-pcie3", "--policy", "best"), "unknown policy best"),
        (("--machine", "mixtral-8x7b-2bit-12gb-pcie3", "--warm-up", "9999"), "fewer than the 128 tokens"),
        (("--machine", "mixtral-8x7b-2bit-12gb-pcie3", "--policy", ","), "--policy is empty"),
    ],
)
def test_errors_are_one_line(
    options: tuple[str, ...],
    message: str,
    demo_trace: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run(monkeypatch, "simulate", "--trace", demo_trace, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_bench_policies(
    demo_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, prompts = tmp_path / "out.json", tmp_path / "prompts.txt"
    prompts.write_text("And the LORD\n\ndef read(\n")
    options = ("--prompts", prompts, "--tokens", 3, "--warm-up", 1, "--repeats", 1, "--threads", 1, "--report", out)
    options += ("--policies", "lru,mixtral-offloading", "--memory", "25%", "--allow-buffered")
    assert run(monkeypatch, "bench", "policies", demo_store, *options) == 0
    assert "×m-o" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["script"] == {"prompts": ["And the LORD", "def read("], "tokens": 3, "warm_up": 1}
    assert [row["runs"][0]["tokens"] for row in found["rows"]] == [6, 6]


def test_times_and_bandwidths() -> None:
    assert parse_bandwidths("250MB, 1GiB/s", "--link-bandwidth") == [250e6, 2**30]
    assert [parse_seconds(text, "--x") for text in ("50us", "1.5ms", "2 s")] == pytest.approx([5e-5, 1.5e-3, 2])
    assert [format_seconds(seconds) for seconds in (0.0, 1e-4, 0.002, 3.0)] == ["0us", "100us", "2ms", "3s"]
    with pytest.raises(ForegateError, match="--x 1h is not a time"):
        parse_seconds("1h", "--x")
