"""The command line as a user meets it: a real process, its output, its exit code."""

import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Folder = Callable[[str], Path]
GENERATE = ("--prompt", "hello", "--max-new-tokens", "12")


def foregate(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "foregate.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_convert_verify_generate(checkpoint: Folder, tmp_path: Path) -> None:
    store, report_path = tmp_path / "model.store", tmp_path / "report.json"
    done = foregate("convert", checkpoint("mixtral"), store)
    assert done.returncode == 0, done.stderr
    assert "3 MoE layers, 24 experts" in done.stdout
    done = foregate("verify", store)
    assert done.returncode == 0, done.stderr
    assert "24 records and the backbone are intact" in done.stdout
    done = foregate("generate", store, *GENERATE, "--report", report_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("hello")
    for row in ("tokens/s", "hits", "misses", "bytes read", "peak memory", "6 of 24 (25%), lru"):
        assert row in done.stderr
    check_report(json.loads(report_path.read_text()))


def test_inflate(checkpoint: Folder, tmp_path: Path) -> None:
    done = foregate("inflate", checkpoint("mixtral"), tmp_path / "wide", "--hidden", 192, "--ffn", 192)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'wide'}: ")
    assert "MiB in 1 file, in" in done.stdout


def check_report(report: dict) -> None:
    experts, layers = report["experts"], report["by_layer"]
    assert experts["hits"] == sum(layer["hits"] for layer in layers)
    assert experts["misses"] == sum(layer["misses"] for layer in layers)
    assert experts["bytes_read"] == experts["misses"] * report["memory"]["slot_bytes"]
    assert experts["hit_rate"] == experts["hits"] / (experts["hits"] + experts["misses"])
    assert experts["read_path"] in ("direct", "buffered")
    assert report["tokens"] == {"prompt": 5, "generated": 12}
    assert report["tokens_per_second"] == pytest.approx(11 / report["seconds"]["decode"])
    assert report["memory"]["slots"] == 6
    assert report["memory"]["peak_resident_bytes"] == pytest.approx(report["memory"]["planned_bytes"], rel=0.05)
    assert report["settings"]["policy"] == "lru"
    assert report["busy"]["processor"] == pytest.approx(
        1 - experts["stall_seconds"] / (report["seconds"]["first_token"] + report["seconds"]["decode"])
    )
    assert 0 < report["busy"]["link"] <= 1
    assert report["busy"]["bound"] in ("link", "processor")


def test_text_is_the_same_for_every_memory_and_policy(store: Folder) -> None:
    runs = [("8.4%", "lru"), ("2GiB", "demand")]
    texts = {
        foregate("generate", store("mixtral"), *GENERATE, "--memory", memory, "--policy", policy).stdout
        for memory, policy in runs
    }
    assert len(texts) == 1
    assert next(iter(texts)).startswith("hello")


def test_errors_are_one_line_and_exit_code_2(
    fails: Callable[..., str], checkpoint: Folder, store: Folder, tmp_path: Path
) -> None:
    good = store("mixtral")
    assert "no such folder" in fails("convert", tmp_path / "nowhere", tmp_path / "x")
    assert "the nearest is 64 or 128" in fails(
        "inflate", checkpoint("mixtral"), tmp_path / "x", "--hidden", 65, "--ffn", 96
    )
    assert "no such store" in fails("verify", tmp_path / "nowhere")
    assert "no such store" in fails("generate", tmp_path / "nowhere", *GENERATE)
    smallest = fails("generate", good, *GENERATE, "--memory", "1%")
    assert "the smallest that works is --memory 8.34%" in smallest
    assert "unknown policy best" in fails("generate", good, *GENERATE, "--policy", "best")
    assert "prompt is empty" in fails("generate", good, "--prompt", "")
    assert "no such folder for the report" in fails("generate", good, *GENERATE, "--report", tmp_path / "no/r.json")


def test_usage_errors_exit_with_2_too() -> None:
    for arguments in (["generate"], ["convert", "one"], ["nonsense"]):
        assert foregate(*arguments).returncode == 2


def test_an_error_in_a_real_process(tmp_path: Path) -> None:
    done = foregate("verify", tmp_path / "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"foregate: no such store: {tmp_path / 'nowhere'}\n"


def test_help_and_version_are_quick_and_import_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "numpy", "rich", "foregate.lookahead"}
    code = f"import sys, foregate.cli.main; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert foregate("--version").stdout.startswith("foregate ")
    assert min(help_seconds() for _ in range(3)) < 0.5


def help_seconds() -> float:
    """Processor time of `foregate --help`, which other programs do not add to."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    text = foregate("--help").stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert text.index(" Run ") < text.index(" Prepare ") < text.index(" Measure ") < text.index("Exit codes: 0 done")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_colours_are_for_terminals(terminal: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def shown() -> str:
        person = terminal("--help")
        assert person.wait() == 0
        return person.seen

    colour = re.compile(r"\x1b\[[0-9;]*3[0-7]m")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert colour.search(shown())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colour.search(shown())
    monkeypatch.delenv("NO_COLOR")
    assert "\x1b" not in foregate("--help").stdout


def test_json_for_machines(prints: Callable[..., str], checkpoint: Folder, tmp_path: Path) -> None:
    store, report = tmp_path / "store", tmp_path / "report.json"
    made = json.loads(prints("convert", checkpoint("mixtral"), store, "--bits", 4, "--json"))
    assert (made["store"], made["experts"], made["bits"], made["quantizer"]) == (str(store), 24, 4, "refit")
    assert json.loads(prints("verify", store, "--json")) == {"store": str(store), "records": 24, "intact": True}
    text = prints("generate", store, *GENERATE, "--threads", 1)
    written = json.loads(prints("generate", store, *GENERATE, "--threads", 1, "--json", "--report", report))
    assert written.pop("prompt") + written.pop("text") + "\n" == text
    assert written == json.loads(report.read_text())
    assert written["tokens"] == {"prompt": 5, "generated": 12}
