"""The command line run here, in the test's own process, and in a process of its own at a terminal."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from foregate.cli.main import main


@pytest.fixture
def fails(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """fails(*arguments): run the command here; the one line it prints. Exit code 2 and nothing on stdout."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["foregate", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capfd.readouterr()
        assert stopped.value.code == 2
        assert out == ""
        assert err.startswith("foregate: ")
        assert err.count("\n") == 1, err
        return err

    return run


@pytest.fixture
def prints(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """prints(*arguments): run the command here; what it prints on stdout. Exit code 0."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["foregate", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capfd.readouterr()
        assert stopped.value.code == 0, err
        return out

    return run


class Terminal:
    """A command at a pseudo-terminal: what a person sees and types. `expect` waits for text that was not yet expected."""

    def __init__(self, *arguments: object) -> None:
        self._fd, inside = pty.openpty()
        command = [sys.executable, "-m", "foregate.cli.main", *map(str, arguments)]
        self._process = subprocess.Popen(
            command, stdin=inside, stdout=inside, stderr=inside, start_new_session=True, preexec_fn=_take_terminal
        )
        os.close(inside)
        self.seen = ""
        self._read_until = 0

    def type(self, text: str) -> None:
        """Keys; \\x03 is ctrl-C and \\x04 ctrl-D."""
        os.write(self._fd, text.encode())

    def expect(self, pattern: str, timeout: float = 180.0) -> str:
        """All up to and with the first match of `pattern` after the last one."""
        deadline = time.monotonic() + timeout
        while not (match := re.compile(pattern).search(self.seen, self._read_until)):
            left = deadline - time.monotonic()
            assert left > 0 and self._receive(left), f"{pattern!r} was not seen in: {self.seen[self._read_until :]!r}"
        text, self._read_until = self.seen[self._read_until : match.end()], match.end()
        return text

    def interrupt(self, pattern: str) -> str:
        """Ctrl-C until it is answered: one may fall between the prompt and the wait for a key, where Python misses it."""
        for _ in range(10):
            self.type("\x03")
            if self._receive(5.0):
                break
        return self.expect(pattern)

    def wait(self) -> int:
        """The exit code, once the command has ended by itself."""
        while self._receive(180.0):
            pass
        return self._process.wait(10)

    def close(self) -> None:
        """End whatever still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._fd)

    def _receive(self, seconds: float) -> bool:
        """More of what is shown; false at the end."""
        if not select.select([self._fd], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # the other end is closed
            return False
        self.seen += data.decode(errors="replace").replace("\r\n", "\n")
        return bool(data)


def _take_terminal() -> None:
    """Make the pseudo-terminal the one whose ctrl-C reaches this process, even if these tests run where it is ignored."""
    import fcntl
    import signal
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """terminal(*arguments): the command at a terminal, ended after the test."""
    opened: list[Terminal] = []

    def run(*arguments: object) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield run
    for each in opened:
        each.close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where checkpoints are converted to in a test."""
    monkeypatch.setenv("FOREGATE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "stores"
