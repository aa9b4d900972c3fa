"""Devices for tests: every one that this machine has, and simulated ones that can be looked into."""

import pytest
import torch
from links import Turnstile

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
    """Copies go through a turnstile, whose `begun` lists their targets."""

    def __init__(self) -> None:
        super().__init__(None, 0.0, MEMORY)
        self.gate = Turnstile()

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Mark | None) -> None:
        self.gate.go_through(target)
        super().copy(target, source, after)
