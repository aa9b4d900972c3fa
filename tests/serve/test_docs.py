"""What docs/server.md says to type works as it stands there, but for the port."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from live_server import Live

from foregate.config import ServeConfig
from foregate.serve.schemas import MAX_STOPS

PAGE = (Path(__file__).parents[2] / "docs/server.md").read_text()


def block(language: str, containing: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return next(text for text in found if containing in text)


def test_curl_as_written(live: Live) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl on this machine")
    command = block("sh", "curl").replace("http://127.0.0.1:8000", live.url)
    done = subprocess.run(["bash", "-ec", command], capture_output=True, text=True)
    assert '"finish_reason":"length"' in done.stdout, done.stdout + done.stderr


def test_python_as_written(live: Live) -> None:
    script = block("python", "OpenAI").replace("http://127.0.0.1:8000", live.url)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_defaults_are_those_of_the_code() -> None:
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|", PAGE, re.MULTILINE))
    limits = {
        "--max-running": f"{ServeConfig.max_running}",
        "--max-waiting": f"{ServeConfig.max_waiting}",
        "--context": f"{ServeConfig.context} tokens",
        "body of a request": f"{ServeConfig.max_body_bytes / 2**20:g} MiB",
        "head": f"{ServeConfig.stalled_seconds:g} s",
        "takes nothing": f"{ServeConfig.stalled_seconds:g} s",
        "connections": f"{ServeConfig.max_connections}",
    }
    for name, value in limits.items():
        assert [rows[row] for row in rows if name in row] == [value]
    assert f"127.0.0.1:{ServeConfig.port}" in PAGE
    assert f"({ServeConfig.shutdown_seconds} s" in PAGE.replace("\n", " ")
    assert f"up to {MAX_STOPS} strings" in PAGE
