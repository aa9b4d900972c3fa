"""Progress bars with ETA on stderr; silent when stderr is not a terminal."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Advance = Callable[[int, int], None]  # (done, total)


def byte_progress(what: str) -> contextlib.AbstractContextManager[Advance]:
    """A bar of bytes with speed and ETA; yields advance(done_bytes, total_bytes)."""
    return _bar(what, DownloadColumn(binary_units=True), TransferSpeedColumn())


def count_progress(what: str, unit: str) -> contextlib.AbstractContextManager[Advance]:
    """A bar of things done, with ETA; yields advance(done, total)."""
    return _bar(what, MofNCompleteColumn(), TextColumn(unit))


@contextlib.contextmanager
def _bar(what: str, *columns: ProgressColumn) -> Iterator[Advance]:
    console = Console(stderr=True)
    every = (TextColumn(what), BarColumn(), *columns, TextColumn("ETA"), TimeRemainingColumn())
    with Progress(*every, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
