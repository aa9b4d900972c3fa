"""The folder in which a conversion works until its store is complete: allocation, journal, lock, final rename."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from foregate.errors import ForegateError

JOURNAL = "journal.json"
LOCK = "lock"
SLACK_BYTES = 8 << 20  # room for tokenizer, manifest and the file system's own bookkeeping


class Workspace:
    """`DST.partial`. Work that the journal names is on disk for good; the rest is done again after a kill.

    Raises ForegateError when another conversion works there, or the disk is too small.
    """

    def __init__(self, destination: Path, fingerprint: str, output_bytes: int) -> None:
        self.destination = destination
        self.path = self.path_for(destination)
        self.fingerprint = fingerprint
        self.output_bytes = output_bytes
        self.layer_checksums: list[list[str]] = []
        self.backbone_checksum: str | None = None

    @staticmethod
    def path_for(destination: Path) -> Path:
        return destination.with_name(destination.name + ".partial")

    def __enter__(self) -> "Workspace":
        self._check_space()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path / LOCK, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ForegateError(f"another conversion to {self.destination} is running: wait for it") from None
        try:
            self._read_journal()
            if not self.layer_checksums:
                self._clear()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self.layer_checksums:
            shutil.rmtree(self.path, ignore_errors=True)  # nothing worth resuming
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

    def write(self, name: str, content: bytes) -> None:
        """Write a small file whole or not at all."""
        temporary = self.path / (name + ".new")
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self.path / name)

    def backbone_finished(self, checksum: str) -> None:
        self.backbone_checksum = checksum
        self._write_journal()

    def layer_finished(self, checksums: list[str]) -> None:
        self.layer_checksums.append(checksums)
        self._write_journal()

    def publish(self) -> None:
        """Give the finished store its name. The journal goes last: a rename that fails loses nothing."""
        _fsync_folder(self.path)
        self.path.rename(self.destination)
        for helper in (JOURNAL, LOCK):
            (self.destination / helper).unlink()
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
                f"{folder} has {free / 2**20:,.0f} MiB free and the store needs {needed / 2**20:,.0f} MiB: free space or "
                "name a destination on another disk"
            )

    def _read_journal(self) -> None:
        try:
            journal = json.loads((self.path / JOURNAL).read_text())
        except FileNotFoundError:
            return
        except ValueError:
            raise ForegateError(f"{self.path / JOURNAL} is damaged: remove the folder {self.path}") from None
        if journal.get("fingerprint") == self.fingerprint:
            self.layer_checksums = journal["layers"]
            self.backbone_checksum = journal["backbone"]
        elif journal.get("layers"):
            raise ForegateError(
                f"{self.path} holds an unfinished conversion with another source or other settings: finish that one, or "
                "remove the folder"
            )

    def _clear(self) -> None:
        """Remove what earlier work left that is not worth resuming."""
        for file in self.path.iterdir():
            if file.name != LOCK:
                file.unlink()
        self.backbone_checksum = None

    def _write_journal(self) -> None:
        journal = {
            "fingerprint": self.fingerprint,
            "backbone": self.backbone_checksum,
            "layers": self.layer_checksums,
        }
        self.write(JOURNAL, json.dumps(journal).encode())


def _fsync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
