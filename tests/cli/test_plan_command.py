"""`foregate plan` and `foregate doctor` as a user meets them; and the plan's promise, kept by a real run."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import foregate
from foregate.checkpoint.inflate import inflate
from foregate.cli.main import main
from foregate.doctor import Report
from foregate.doctor.check import Check

DEMO = Path(__file__).parents[2] / "demo"


def command(*arguments: object) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "foregate.cli.main", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True)


@pytest.fixture
def prints(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """prints(*arguments): run the command here; (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["foregate", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stopped:
            code = stopped.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def inflated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model with 24 MB of backbone and 64 MB of experts at 4 bits."""
    folder = tmp_path_factory.mktemp("inflated")
    inflate(DEMO / "mixtral-tiny", folder / "wide", hidden=512, ffn=768)
    store = foregate.convert(folder / "wide", folder / "store", bits=4)
    shutil.rmtree(folder / "wide")  # a quarter of a gigabyte
    return store


def test_a_run_holds_what_was_planned(inflated: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ["--prompt", "And the LORD said unto Moses,", "--max-new-tokens", 40, "--temperature", 0.8]
    planned = json.loads(command("plan", inflated, "--memory", "50%", "--context", 64, "--json").stdout)
    memory = planned["memory_bytes"]
    done = command("generate", inflated, *options, "--memory", memory, "--context", 64, "--report", report)
    assert done.returncode == 0, done.stderr
    held = json.loads(report.read_text())["memory"]
    assert held["peak_resident_bytes"] == pytest.approx(memory, rel=0.05)
    assert held["planned_bytes"] <= memory
    assert held["slots"] == pytest.approx(48, abs=10)  # a process is not planned to the last MiB


def test_a_plan_for_a_person(prints: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = prints("plan", DEMO / "mixtral-tiny", "--memory", "50%", "--bits", 3)
    assert code == 0
    for words in ("12 MoE layers, 96 experts, top-2; 3 bits", "backbone", "KV cache", "48 of 96 experts (50.0%)"):
        assert words in out
    for words in ("in all", "largest context: 1,024 tokens", "tokens/s with lookahead, by simulation", "(assumed)"):
        assert words in out
    assert "\x1b[" not in out  # no colours when piped


def test_a_plan_for_the_server_has_a_cache_for_every_reply(prints: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = prints("plan", DEMO / "mixtral-tiny", "--memory", "50%", "--context", 256, "--max-running", 8)
    assert code == 0
    assert "keys, values and states of 256 tokens, 8 times" in out


def test_a_plan_for_a_card_shows_both_memories(prints: Callable[..., tuple[int, str, str]]) -> None:
    options = ("--device", "cuda", "--host-memory", "50%", "--link-bandwidth", "12GB", "--memory-bandwidth", "300GB")
    code, out, _ = prints("plan", DEMO / "mixtral-tiny", "--memory", "25%", *options)
    assert code == 0
    for words in (
        "cuda memory",
        "the driver's context",
        "host memory",
        "48 experts wait here, 48 on the disk",
        "misses at 12 GB/s (given); those that only the disk has at 2 GB/s",
        "no card has been measured",
    ):
        assert words in " ".join(out.split())


def test_a_plan_that_cannot_be_made(prints: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = prints("plan", DEMO / "mixtral-tiny", "--memory", "90MiB")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "the smallest that works is --memory" in err
    code, _, err = prints("plan", DEMO / "mixtral-tiny", "--memory", "50%", "--machine", "x", "--measure")
    assert (code, err.startswith("foregate: --machine and --measure")) == (2, True)


def test_the_doctor_exits_with_1_when_something_is_broken(
    prints: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = [
        Check("kernels", "cpu", "slow", "not built", "install a compiler"),
        Check("self-test", "engine", "ok", "fine"),
        Check("kernels", "triton", "ok", "not used"),
    ]
    examined = Report({"system": "Linux"}, {"python": "3.11", "triton": None}, Path("/tmp"), checks=checks)
    monkeypatch.setattr("foregate.doctor.examine", lambda store: examined)
    code, out, _ = prints("doctor")
    assert code == 0
    assert out.index("triton") < out.index("engine")  # by topic
    assert "→ install a compiler" in out
    checks.append(Check("machine", "memory", "broken", "none", "buy some"))
    code, out, _ = prints("doctor", "--json")
    assert (code, json.loads(out)["usable"]) == (1, False)
