"""A device that is not there: host memory stands for its memory, and the paced link for its bus. Computes on the CPU."""

from dataclasses import dataclass

import torch

from foregate.memory.device import Mark, no_room
from foregate.memory.pages import allocate


@dataclass(frozen=True)
class FinishedCopy:
    """Tensors that were on the host all the time."""

    tensors: tuple[torch.Tensor, ...]

    def wait(self) -> tuple[torch.Tensor, ...]:
        return self.tensors


class SimulatedDevice:
    """`memory_bytes` of memory behind a link of `bandwidth` bytes/s (None: not paced) and `latency` seconds a record.

    See `Device`. Compute is through before anything else happens, so that its marks say nothing.
    """

    name = path = "simulated"
    torch_device = torch.device("cpu")

    def __init__(self, bandwidth: float | None, latency: float, memory_bytes: int) -> None:
        self.bandwidth, self.latency = bandwidth, latency
        self.free_bytes = self.total_bytes = memory_bytes

    def slots(self, slots: int, slot_bytes: int) -> torch.Tensor:
        if slots * slot_bytes > self.total_bytes:
            raise no_room(self.name, slots * slot_bytes, self.total_bytes)
        return self.host_buffer(slots * slot_bytes).view(slots, slot_bytes)

    @torch.inference_mode(False)  # the link's threads write to it in the ordinary mode
    def host_buffer(self, nbytes: int) -> torch.Tensor:
        return torch.frombuffer(allocate(nbytes), dtype=torch.uint8)

    def release(self, buffer: torch.Tensor) -> None:
        pass

    def mark(self) -> Mark:
        return None

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Mark | None) -> None:
        target.copy_(source)

    def to_host(self, *tensors: torch.Tensor) -> FinishedCopy:
        return FinishedCopy(tuple(tensor.clone() for tensor in tensors))
