"""What tests of the link share: who listens to it, and a disk that answers one read at a time."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from foregate.checkpoint.store import ExpertKey, Store
from foregate.memory.link import Finished

PATIENCE = 20.0  # seconds until a test gives up


def records_of(store: Store) -> dict[ExpertKey, torch.Tensor]:
    """Every record as the safetensors library reads it."""
    tensors = load_file(store.experts_path)
    keys = [(n, e) for n, layer in enumerate(store.layers) for e in range(layer.num_experts)]
    return {key: tensors[store.record_name(key)] for key in keys}


class Listener:
    """Collects what a link tells; `then` is called with each, in the reader thread."""

    def __init__(self, then: Callable[[Finished], None] = lambda finished: None) -> None:
        self.told: list[Finished] = []
        self.threads: set[str] = set()
        self._then = then
        self._more = threading.Condition()

    def __call__(self, finished: Finished) -> None:
        self.threads.add(threading.current_thread().name)
        self._then(finished)
        with self._more:
            self.told.append(finished)
            self._more.notify_all()

    def wait(self, count: int) -> list[Finished]:
        """Everything told, once that is at least `count` loads."""
        with self._more:
            assert self._more.wait_for(lambda: len(self.told) >= count, PATIENCE), "the link is silent"
            return list(self.told)

    @property
    def keys(self) -> list[ExpertKey]:
        return [finished.key for finished in self.told]


class Turnstile:
    """Threads that go through wait here until they are let through, first come, first served.

    `begun` lists what they came for, in the order in which they came.
    """

    def __init__(self) -> None:
        self.begun: list[Any] = []
        self._changed = threading.Condition()  # guards what follows, and `begun`
        self._came = self._allowed = 0

    def wait_begun(self, count: int) -> None:
        """Wait until `begun` is so long."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.begun) >= count, PATIENCE), "nobody comes"

    def let_through(self, count: int = 1000) -> None:
        with self._changed:
            self._allowed += count
            self._changed.notify_all()

    def let_through_singly(self, total: int) -> None:
        """Each when the one before has come back, until `total` have begun; then all.

        One thread at a time is on its way, so they come, and load after load is finished, in the order of their claims.
        """
        while (count := len(self.begun)) < total:
            self.let_through(1)
            self.wait_begun(count + 1)
        self.let_through()

    def go_through(self, what: object) -> None:
        with self._changed:
            ticket, self._came = self._came, self._came + 1
            self.begun.append(what)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: ticket < self._allowed, PATIENCE), "nobody lets it through"


class Gate(Turnstile):
    """Reads of the experts file wait until they are let through; `begun` lists their (record, chunk)."""

    def __init__(self, store: Store, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self._store, self._chunk_bytes, self._real = store, chunk_bytes, os.preadv
        monkeypatch.setattr(os, "preadv", self._read)

    def _read(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        self.go_through(self._place(offset))
        return self._real(fd, buffers, offset)

    def _place(self, offset: int) -> tuple[ExpertKey, int]:
        for layer, info in enumerate(self._store.layers):
            first, nbytes = self._store.location((layer, 0))
            if 0 <= offset - first < info.num_experts * nbytes:
                return (layer, (offset - first) // nbytes), (offset - first) % nbytes // self._chunk_bytes
        raise AssertionError("a read outside all records")


def open_descriptors(path: Path) -> int:
    """How often this process has the file open."""
    links = (entry for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())
    return sum(os.path.realpath(link) == str(path.resolve()) for link in links)
