"""`foregate serve` as a user meets it: a real process, its greeting, its errors, its end."""

import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from foregate.cli.main import main
from foregate.errors import ForegateError
from foregate.serve.server import Address, read_key, rules

PAGE = Path(__file__).parents[2] / "docs/server.md"


def test_it_serves_until_interrupted(demo_store: Path) -> None:
    documented = re.search(r"^foregate serve model\.store .*$", PAGE.read_text(), re.MULTILINE)[0].split()[1:]
    arguments = [str(demo_store) if part == "model.store" else part for part in documented]
    command = [sys.executable, "-m", "foregate.cli.main", *arguments, "--port", "0", "--name", "tiny"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        greeting = process.stderr.readline()
        url = re.fullmatch(r"tiny: page (http://127\.0\.0\.1:\d+)/  API \1/v1\n", greeting)[1]
        with urllib.request.urlopen(f"{url}/health") as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert process.stderr.read() == ""


def test_errors_are_one_line(
    demo_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def error(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["foregate", "serve", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capfd.readouterr()
        assert (stopped.value.code, out, err.count("\n")) == (2, "", 1)
        return err

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        used = error(demo_store, "--port", port)
    assert used.startswith(f"foregate: cannot listen on 127.0.0.1 port {port} (Address already in use): choose another")
    assert "no such store" in error(tmp_path / "nowhere")
    assert "--max-running 0: too small" in error(demo_store, "--max-running", 0)


def test_the_key_comes_from_the_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOREGATE_API_KEY", raising=False)
    assert read_key(None) is None
    monkeypatch.setenv("FOREGATE_API_KEY", "from-environment")
    assert read_key(None) == "from-environment"
    file = tmp_path / "key"
    file.write_text("from-file\n")
    assert read_key(file) == "from-file"
    for bad in ("", " \n", "two words", "é"):
        file.write_text(bad)
        with pytest.raises(ForegateError, match="holds no usable API key"):
            read_key(file)
    with pytest.raises(ForegateError, match="No such file"):
        read_key(tmp_path / "nothing")
    monkeypatch.setenv("FOREGATE_API_KEY", "")
    with pytest.raises(ForegateError, match="environment variable FOREGATE_API_KEY"):
        read_key(None)


def test_who_may_ask_depends_on_address_and_key() -> None:
    assert rules(Address("127.0.0.1", 1), None).hosts == {"localhost", "127.0.0.1", "::1"}
    assert rules(Address("127.0.0.1", 1), "key").hosts is None
    assert rules(Address("0.0.0.0", 1), None).hosts is None
    assert Address("::1", 80).url == "http://[::1]:80"
