"""`foregate generate` on a device: options in, report out."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foregate.cli.main import app

OPTIONS = ["--prompt", "And God said", "--max-new-tokens", "8", "--threads", "1", "--device", "simulated"]


def generate(store: Path, *options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["generate", str(store), *OPTIONS, *options])
    return result.exit_code, result.output


def test_the_report_says_where_experts_were_computed(demo_store: Path, tmp_path: Path) -> None:
    for name, options in (("placed", ["--link-latency", "4ms"]), ("exact", ["--exact", "--link-bandwidth", "500MB"])):
        report = tmp_path / f"{name}.json"
        status, text = generate(demo_store, *options, "--host-memory", "4MiB", "--report", str(report))
        assert status == 0
        assert text.startswith("And God said")
        device, experts = (json.loads(report.read_text())[part] for part in ("device", "experts"))
        assert (device["name"], device["backbone"]) == ("simulated", "float32, eager")
        assert device["records_in_host_memory"] < 96
        assert (experts["experts_on_host"] > 0) is (name == "placed")
        assert bool(device["placement"]) is (name == "placed")
        assert experts["read_path"] == "simulated"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--link-latency", "fast"], "--link-latency fast is not a time"),
        (["--link-bandwidth", "0"], "a link moves at least one byte a second"),
        (["--host-memory", "lots"], "--host-memory lots is not a size"),
    ],
)
def test_options_that_say_nothing(demo_store: Path, options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["generate", str(demo_store), *OPTIONS, *options])
    assert result.exit_code
    assert message in result.output + str(result.exception)
