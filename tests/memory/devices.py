"""Devices for tests: every one that this machine has, and simulated ones that can be looked into."""

import threading

import pytest
import torch
from links import PATIENCE

from foregate.memory.cuda import CudaDevice
from foregate.memory.device import Device, Mark
from foregate.memory.simulated import SimulatedDevice

MEMORY = 1 << 30  # bytes of a simulated device
DEVICES = [
    "simulated",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")),
]


def open_device(name: str) -> Device:
    return CudaDevice() if name == "cuda" else SimulatedDevice(None, 0.0, MEMORY)


class WatchedDevice(SimulatedDevice):
    """Notes buffers and the marks that copies wait for; its marks are numbers."""

    def __init__(self) -> None:
        super().__init__(None, 0.0, MEMORY)
        self.buffers: list[torch.Tensor] = []
        self.released: list[torch.Tensor] = []
        self.afters: list[Mark] = []
        self._marks = 0

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        self.buffers.append(super().host_buffer(nbytes))
        return self.buffers[-1]

    def release(self, buffer: torch.Tensor) -> None:
        self.released.append(buffer)

    def mark(self) -> Mark:
        self._marks += 1
        return self._marks

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Mark | None) -> None:
        self.afters.append(after)
        super().copy(target, source, after)


class GatedDevice(SimulatedDevice):
    """Copies wait until they are let through; `begun` lists their targets in order."""

    def __init__(self) -> None:
        super().__init__(None, 0.0, MEMORY)
        self.begun: list[torch.Tensor] = []
        self._permits, self._more = threading.Semaphore(0), threading.Condition()

    def wait_begun(self, count: int) -> None:
        """Wait until so many copies have begun."""
        with self._more:
            assert self._more.wait_for(lambda: len(self.begun) >= count, PATIENCE), "no copy begins"

    def let_through(self, count: int = 1000) -> None:
        self._permits.release(count)

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Mark | None) -> None:
        with self._more:
            self.begun.append(target)
            self._more.notify_all()
        assert self._permits.acquire(timeout=PATIENCE), "nobody lets the copy through"
        super().copy(target, source, after)
