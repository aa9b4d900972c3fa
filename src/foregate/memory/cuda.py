"""A CUDA card: its memory, pinned host memory, one stream for copies into slots, events between copies and compute."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from foregate.errors import ForegateError
from foregate.memory.device import Mark, no_room
from foregate.memory.pages import allocate


@dataclass(frozen=True)
class CudaCopy:
    """Copies under way to pinned memory, and the event behind them."""

    tensors: tuple[torch.Tensor, ...]
    done: torch.cuda.Event

    def wait(self) -> tuple[torch.Tensor, ...]:
        self.done.synchronize()
        return self.tensors


class CudaDevice:
    """The card `index`. See `Device`. Raises ForegateError if PyTorch finds no such card."""

    bandwidth = None
    latency = 0.0

    def __init__(self, index: int = 0) -> None:
        cards = torch.cuda.device_count()
        if index >= cards:
            raise ForegateError(
                f"cuda:{index} is not here, PyTorch finds {cards} CUDA devices: check nvidia-smi and that PyTorch's build "
                f"({torch.__version__}) has CUDA"
            )
        self.name, self.torch_device = f"cuda:{index}", torch.device("cuda", index)
        self.free_bytes, self.total_bytes = torch.cuda.mem_get_info(self.torch_device)
        self._copies = torch.cuda.Stream(self.torch_device)
        self._pins = True  # until the system refuses
        self._pinned: set[int] = set()  # addresses of buffers

    @property
    def path(self) -> str:
        """Whether the host's buffers are pinned; one that is not makes it "unpinned"."""
        return "pinned" if self._pins else "unpinned"

    @torch.inference_mode(False)  # the link's threads write to them in the ordinary mode
    def slots(self, slots: int, slot_bytes: int) -> torch.Tensor:
        try:
            return torch.empty(slots, slot_bytes, dtype=torch.uint8, device=self.torch_device)
        except torch.OutOfMemoryError as error:
            raise no_room(self.name, slots * slot_bytes, torch.cuda.mem_get_info(self.torch_device)[0]) from error

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        buffer = torch.frombuffer(allocate(nbytes), dtype=torch.uint8)  # PyTorch's own would round up to a power of two
        if self._pins:
            self._pin(buffer)
        return buffer

    def release(self, buffer: torch.Tensor) -> None:
        if buffer.data_ptr() in self._pinned:
            self._pinned.remove(buffer.data_ptr())
            torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())

    def mark(self) -> Mark:
        return torch.cuda.current_stream(self.torch_device).record_event()

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Mark | None) -> None:
        done = torch.cuda.Event(blocking=True)  # the thread sleeps: the cores are for experts
        with torch.cuda.stream(self._copies):
            if after is not None:
                self._copies.wait_event(after)
            target.copy_(source, non_blocking=True)
            done.record(self._copies)
        done.synchronize()

    def to_host(self, *tensors: torch.Tensor) -> CudaCopy:
        copies = tuple(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors)
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        return CudaCopy(copies, torch.cuda.current_stream(self.torch_device).record_event())

    def _pin(self, buffer: torch.Tensor) -> None:
        with ThreadPoolExecutor(
            1
        ) as thread:  # a refusal is the thread's last error: here, the next kernel would raise it
            code = thread.submit(self._register, buffer).result()
        if code == 0:
            self._pinned.add(buffer.data_ptr())
            return
        self._pins = False
        warnings.warn(
            f"host memory cannot be pinned (CUDA error {code}): copies to {self.name} will be slower; raise the limit of "
            f"locked memory (ulimit -l unlimited), or leave more host memory free",
            RuntimeWarning,
            stacklevel=2,
        )

    def _register(self, buffer: torch.Tensor) -> int:
        with torch.cuda.device(self.torch_device):
            return int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0))
