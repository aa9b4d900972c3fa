"""What differs between a card and the simulated one: memory for slots, copies into it, and small copies back of ids.

Everything above this contract runs on either. Weights only ever go from the host to the device.
"""

from typing import Any, Protocol

import torch

from foregate.errors import ForegateError

Mark = Any  # a point in the device's compute; only the device that gave it knows what it is


class HostCopy(Protocol):
    """Small tensors on their way to the host."""

    def wait(self) -> tuple[torch.Tensor, ...]:
        """The tensors in host memory, once they and all compute queued before them are through. The GIL is free."""


class Device(Protocol):
    """Where the experts are computed. `copy` is called by several threads at a time, the rest by the engine's alone."""

    name: str  # "cuda:0", "simulated"
    torch_device: torch.device
    path: str  # how copies go, for the report: "pinned", "unpinned", "simulated"
    bandwidth: float | None  # bytes/s that the link is paced to; None where there is a real one
    latency: float  # seconds that the paced link adds to a record
    free_bytes: int  # of the device's memory, when it was opened
    total_bytes: int

    def slots(self, slots: int, slot_bytes: int) -> torch.Tensor:
        """Uint8 [slots, slot_bytes] on the device, contiguous, contents undefined. ForegateError if there is no room."""

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        """Uint8 [nbytes] of host memory, page-aligned: pinned where the system allows it, otherwise noted once."""

    def release(self, buffer: torch.Tensor) -> None:
        """Unpin a `host_buffer`; nothing may be copying from it."""

    def mark(self) -> Mark:
        """A mark behind all compute queued so far."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Mark | None) -> None:
        """Copy host bytes to the device once compute has passed the mark, past all other compute.

        Blocks the calling thread until the bytes are there, with the GIL free. Compute queued afterwards sees them.
        """

    def to_host(self, *tensors: torch.Tensor) -> HostCopy:
        """Start copying small tensors to the host, behind all compute queued so far. Does not block."""


def no_room(device: str, needed: int, free: int) -> ForegateError:
    """The error for memory that the device does not have."""
    return ForegateError(
        f"{device}: {needed / 2**30:.2f} GiB for experts do not fit, {free / 2**30:.2f} GiB are free; "
        f"give less with --memory"
    )
