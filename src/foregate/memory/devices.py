"""Devices by name."""

import os

import torch

from foregate.errors import ForegateError
from foregate.memory.cuda import CudaDevice
from foregate.memory.device import Device
from foregate.memory.simulated import SimulatedDevice

CPU, CUDA, SIMULATED, AUTO = "cpu", "cuda", "simulated", "auto"
NAMES = (CPU, CUDA, SIMULATED, AUTO)


def open_device(name: str, bandwidth: float | None, latency: float) -> Device | None:
    """The device called `name`; None for the CPU, which needs no link to its own memory.

    "auto" is "cuda" where there is a card, otherwise "cpu". bandwidth, latency: of the simulated device's link, bytes/s
    and seconds. Raises ForegateError for an unknown name, and where there is no card.
    """
    if name not in NAMES:
        raise ForegateError(f"unknown device {name}: choose one of {', '.join(NAMES)}")
    if name == CUDA or (name == AUTO and torch.cuda.is_available()):
        return CudaDevice()
    if name == SIMULATED:
        return SimulatedDevice(bandwidth, latency, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return None
