"""Stores converted on first use: when a command is given a checkpoint, its store is kept in the user's cache.

A store's name says which checkpoint it is of, at how many bits, and the state of that checkpoint's files: a changed
checkpoint gets another store. A conversion that was interrupted goes on when it is asked for again; of two processes
that want the same store one converts and the other waits.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from foregate.checkpoint.convert import Progress, convert
from foregate.checkpoint.source import SIDE_FILES, find_checkpoint, open_checkpoint
from foregate.checkpoint.store import FORMAT_VERSION
from foregate.errors import ForegateError

FOLDER_VARIABLE = "FOREGATE_CACHE"
LOCK_SUFFIX = ".lock"


def cache_folder() -> Path:
    """Where stores are kept: in $FOREGATE_CACHE, else below $XDG_CACHE_HOME, else below ~/.cache."""
    if chosen := os.environ.get(FOLDER_VARIABLE):
        return Path(chosen).expanduser().absolute() / "stores"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "foregate" / "stores"


@dataclass(frozen=True)
class CachedModel:
    """A checkpoint, by folder or hub id, at a number of bits, and the place of its store."""

    source: str
    bits: int

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint's folder; None for a hub id that was never downloaded. Raises ForegateError for neither."""
        return find_checkpoint(self.source)

    def store(self) -> Path | None:
        """The finished store, or None when there is none yet."""
        folder = self.checkpoint
        path = None if folder is None else self._path(folder)
        return path if path and path.is_dir() else None

    def convert(self, progress: Progress, waiting: Callable[[], None]) -> Path:
        """The store, downloaded and converted if need be; `waiting` is called when another process is at it.

        Raises ForegateError on a checkpoint that cannot be converted, a full disk, or a cache that cannot be written.
        """
        folder = open_checkpoint(self.source).path  # completes a download that was cut short
        path = self._path(folder)
        with _only_here(path, waiting):
            if not path.is_dir():
                convert(folder, path, bits=self.bits, progress=progress)
        return path

    def _path(self, folder: Path) -> Path:
        name = folder.name if Path(self.source).expanduser().is_dir() else self.source.replace("/", "--")
        name = re.sub(r"[^\w.-]", "_", name).lstrip(".") or "model"
        return cache_folder() / f"{name}-{self.bits}-{fingerprint(folder)}.store"


def fingerprint(folder: Path) -> str:
    """16 digits that change with the place, name, size or time of change of any file that a conversion reads."""
    files = {file for pattern in ("*.safetensors", *SIDE_FILES) for file in folder.glob(pattern) if file.is_file()}
    states = [(file.name, status.st_size, status.st_mtime_ns) for file in sorted(files) if (status := file.stat())]
    facts = json.dumps([FORMAT_VERSION, str(folder), states])
    return hashlib.sha256(facts.encode(errors="surrogateescape")).hexdigest()[:16]


@contextlib.contextmanager
def _only_here(store: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a store. Its file goes once the store is there: who waited for it then finds the store."""
    lock = store.with_name(store.name + LOCK_SUFFIX)
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        stream = lock.open("w")
    except OSError as error:
        raise ForegateError(
            f"cannot write the cache {store.parent} ({error.strerror}): name another folder in {FOLDER_VARIABLE}"
        ) from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
        lock.unlink(missing_ok=True)
