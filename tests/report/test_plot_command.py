"""`foregate plot` as a user meets it: files in every format, one line for what cannot be read or written."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foregate.cli.main import main
from foregate.report.plots.traffic import traffic
from foregate.report.read import read_report

pytest.importorskip("matplotlib")

File = Callable[[str], Path]
PICTURES = {"timeline", "predictions", "traffic", "routing"}


@pytest.fixture
def plot(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """plot(*arguments): exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["foregate", "plot", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code or 0, *capfd.readouterr()

    return call


def test_one_report_in_both_formats(plot: Callable, report_file: File, tmp_path: Path) -> None:
    code, out, err = plot(report_file("lookahead"), "-o", tmp_path / "new/pictures", "--format", "png,svg")
    assert (code, err) == (0, "")
    written = {path.name for path in (tmp_path / "new/pictures").iterdir()}
    assert written == {f"{name}.{ending}" for name in PICTURES for ending in ("png", "svg")} | {"trace.json"}
    for path in (tmp_path / "new/pictures").iterdir():
        content = path.read_bytes()
        assert len(content) > 5_000
        if path.suffix == ".png":
            assert content.startswith(b"\x89PNG")
    svg = {name: (tmp_path / f"new/pictures/{name}.svg").read_text() for name in PICTURES}
    for name, texts in {
        "timeline": ["processor", "loads", "demand load"],
        "predictions": ["1 ahead", "3 ahead", "from the token", "precision"],
        "traffic": ["demand", "prefetched, useful"],
        "routing": ["expert", "MoE layer"],
    }.items():
        for text in texts:
            assert f"<!-- {text} -->" in svg[name], (name, text)
    assert json.loads((tmp_path / "new/pictures/trace.json").read_text())["traceEvents"]
    for line in (
        r"tokens +24 after a prompt of 12",
        r"layer \+1 +recall@k [0-9.]+%, precision",
        r"prefetches +[0-9]+: ",
    ):
        assert re.search(line, out), out


def test_several_reports_and_their_comparison(plot: Callable, report_file: File, tmp_path: Path) -> None:
    code, out, _ = plot(report_file("lookahead"), report_file("lru"), "-o", tmp_path / "out", "--tokens", 3)
    assert code == 0
    own = {f"{run}-{name}.png" for run in ("lookahead", "lru") for name in PICTURES}
    assert {path.name for path in (tmp_path / "out").iterdir()} == own | {
        "comparison.png",
        "lookahead-trace.json",
        "lru-trace.json",
    }
    assert "recall" not in out  # the summary is one report's


def test_a_report_without_a_time_line(plot: Callable, report_file: File, tmp_path: Path) -> None:
    path = edited(report_file("lru"), lambda report: report.update(timeline=None))
    assert plot(path, "-o", tmp_path / "out")[0] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"predictions.png", "traffic.png", "routing.png"}


def test_bytes_by_use_are_all_bytes(run: Callable[[str], Any], report_file: File) -> None:
    for policy in ("lru", "lookahead"):
        assert sum(map(sum, traffic(read_report(report_file(policy))).values())) == run(policy).bytes_moved


def edited(path: Path, edit: Callable[[dict], Any]) -> Path:
    report = json.loads(path.read_text())
    edit(report)
    path.write_text(json.dumps(report))
    return path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda report: report.pop("report_version"), "is no report of a run"),
        (lambda report: report.update(report_version=2), "is a report of version 2, this Foregate reads 3"),
        (lambda report: report.pop("by_layer"), "is damaged"),
        (lambda report: report["by_layer"].pop(), "is damaged"),
        (lambda report: report["by_layer"][0].update(hits="many"), "is damaged"),
        (lambda report: report["by_layer"][0]["prefetches"].pop("late"), "is damaged"),
        (lambda report: report["routing"]["missed"][3].pop(), "is damaged"),
        (lambda report: report["predictions"]["by_layer"][0].update(layer=99), "is damaged"),
        (lambda report: report["timeline"]["loads"][0].append(1), "is damaged"),
        (lambda report: report["timeline"]["loads"][0].__setitem__(4, "odd"), "is damaged"),
        (lambda report: report.update(timeline=[]), "is damaged"),
        (lambda report: report.update(model=None), "is damaged"),
    ],
)
def test_files_that_are_no_reports(
    plot: Callable, report_file: File, tmp_path: Path, edit: Callable[[dict], Any], message: str
) -> None:
    one_line(plot(edited(report_file("lookahead"), edit), "-o", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


def one_line(result: tuple[int, str, str], message: str) -> None:
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("foregate: ") and err.count("\n") == 1, err
    assert message in err


def test_what_cannot_be_read_or_written(plot: Callable, report_file: File, tmp_path: Path) -> None:
    good, out = report_file("lru"), tmp_path / "out"
    (tmp_path / "text").write_text("no JSON")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "list").write_text("[1]")
    (tmp_path / "copies").mkdir()
    (tmp_path / "copies/lru.json").write_text(good.read_text())
    one_line(plot(tmp_path / "nothing.json", "-o", out), "cannot read the report")
    one_line(plot(tmp_path, "-o", out), "cannot read the report")
    one_line(plot(tmp_path / "text", "-o", out), "is no JSON file")
    one_line(plot(tmp_path / "binary", "-o", out), "is no JSON file")
    one_line(plot(tmp_path / "list", "-o", out), "is no report of a run")
    one_line(plot(good, "-o", tmp_path / "text"), "is a file: name a folder")
    one_line(plot(good, "-o", "/proc/no/folder"), "cannot write into /proc/no/folder")
    one_line(plot(good, "-o", out, "--format", "gif"), "--format gif: there are png, svg, pdf")
    one_line(plot(good, "-o", out, "--tokens", 0), "--tokens 0")
    one_line(plot(good, report_file("lookahead"), "-o", out, "--first", 30), "--first 30")
    one_line(plot(good, tmp_path / "copies/lru.json", "-o", out), "two reports are called lru")
    assert not out.exists()


def test_without_matplotlib(plot: Callable, report_file: File, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    one_line(plot(report_file("lru"), "-o", tmp_path / "out"), 'plot needs matplotlib: pip install "foregate[plot]"')
    assert not (tmp_path / "out").exists()
