"""The folder in which a long job works until its result is complete: allocation, journal, lock, final rename."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from foregate.errors import ForegateError

JOURNAL = "journal.json"
LOCK = "lock"
SLACK_BYTES = 8 << 20  # room for tokenizer, manifest and the file system's own bookkeeping


class PartialFolder:
    """`DST.partial`, the folder of a long job. What its journal names is on disk for good; the rest is done again.

    Subclasses say what they call the job and its result, and whether a journal holds work worth resuming. Raises
    ForegateError when the same job runs already, the folder belongs to another one, or the disk is too small.
    """

    job: str
    result: str

    def __init__(self, destination: Path, fingerprint: str, output_bytes: int) -> None:
        self.destination = destination
        self.path = self.path_for(destination)
        self.fingerprint = fingerprint
        self.output_bytes = output_bytes
        self.done: dict[str, Any] = {}  # what the journal says

    @staticmethod
    def path_for(destination: Path) -> Path:
        return destination.with_name(destination.name + ".partial")

    @staticmethod
    def worth_resuming(journal: dict[str, Any]) -> bool:
        """Whether a journal names enough work to keep."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._check_space()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path / LOCK, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ForegateError(f"another {self.job} to {self.destination} is running: wait for it") from None
        try:
            self._read_journal()
            if not self.worth_resuming(self.done):
                self._clear()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self.worth_resuming(self.done):
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def allocate(self, name: str, nbytes: int) -> None:
        """Reserve the whole file now, so that a full disk shows before the work and not after it."""
        with self.open(name) as fd:
            os.posix_fallocate(fd, 0, nbytes)
            os.ftruncate(fd, nbytes)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[int]:
        """A file descriptor for writing; what was written is on disk when the block ends."""
        fd = os.open(self.path / name, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            yield fd
            os.fsync(fd)
        finally:
            os.close(fd)

    @staticmethod
    def sync(descriptors: Iterable[int]) -> None:
        """Have what was written to open files on disk for good."""
        for fd in descriptors:
            os.fsync(fd)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file whole or not at all."""
        temporary = self.path / (name + ".new")
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self.path / name)

    def finished(self, **work: Any) -> None:
        """Enter finished work, already on disk, into the journal."""
        self.done |= work
        self.write(JOURNAL, json.dumps({"fingerprint": self.fingerprint, **self.done}).encode())

    def publish(self) -> None:
        """Give the finished folder its name. The journal goes last: a rename that fails loses nothing."""
        _fsync_folder(self.path)
        self.path.rename(self.destination)
        for helper in (JOURNAL, LOCK):
            (self.destination / helper).unlink(missing_ok=True)
        _fsync_folder(self.destination)
        _fsync_folder(self.destination.parent)

    def _check_space(self) -> None:
        folder = self.destination.parent
        while not folder.exists():
            folder = folder.parent
        held = sum(f.stat().st_blocks * 512 for f in self.path.glob("*")) if self.path.exists() else 0
        needed, free = self.output_bytes + SLACK_BYTES - held, shutil.disk_usage(folder).free
        if needed > free:
            raise ForegateError(
                f"{folder} has {free / 2**20:,.0f} MiB free and the {self.result} needs {needed / 2**20:,.0f} MiB: free space or "
                "name a destination on another disk"
            )

    def _read_journal(self) -> None:
        try:
            journal = json.loads((self.path / JOURNAL).read_text())
        except FileNotFoundError:
            return
        except ValueError:
            raise ForegateError(f"{self.path / JOURNAL} is damaged: remove the folder {self.path}") from None
        if journal.pop("fingerprint", None) == self.fingerprint:
            self.done = journal
        elif self.worth_resuming(journal):
            raise ForegateError(
                f"{self.path} holds an unfinished {self.job} with another source or other settings: finish that one, or "
                "remove the folder"
            )

    def _clear(self) -> None:
        """Remove what earlier work left that is not worth resuming."""
        for file in self.path.iterdir():
            if file.name != LOCK:
                file.unlink()
        self.done = {}


class Workspace(PartialFolder):
    """The folder of a conversion: its journal holds the checksums of what is written."""

    job = "conversion"
    result = "store"

    @staticmethod
    def worth_resuming(journal: dict[str, Any]) -> bool:
        return bool(journal.get("layers") or journal.get("matrices"))

    @property
    def layer_checksums(self) -> list[list[str]]:
        """The records' checksums of every finished layer."""
        return self.done.get("layers", [])

    @property
    def backbone_checksum(self) -> str | None:
        return self.done.get("backbone")

    @property
    def matrix_checksums(self) -> list[str]:
        """The records' checksums of every finished matrix of the backbone."""
        return self.done.get("matrices", [])

    def backbone_finished(self, checksum: str) -> None:
        self.finished(backbone=checksum)

    def matrix_finished(self, checksum: str) -> None:
        self.finished(matrices=[*self.matrix_checksums, checksum])

    def layer_finished(self, checksums: list[str]) -> None:
        self.finished(layers=[*self.layer_checksums, checksums])


def check_destination(path: str | Path) -> Path:
    """The absolute path of a folder to be made. Raises ForegateError when something is there, OSError as it comes."""
    destination = Path(path).expanduser().absolute()
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ForegateError(f"{destination} exists already: remove it or name another destination")
    return destination


def io_error(error: OSError, destination: Path, doing: str) -> ForegateError:
    """An error of the operating system as one line; `doing` is what failed, such as "convert to"."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        kept = PartialFolder.path_for(destination)
        what = f"finished work is kept in {kept}: free space and run again" if kept.exists() else "nothing was left"
        return ForegateError(f"the disk of {destination} is full; {what}")
    return ForegateError(f"cannot {doing} {destination}: {error.filename or 'a file'}: {os.strerror(error.errno or 0)}")


def _fsync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
