"""What placement decides by, measured when a model is loaded; it takes as long as a few experts."""

import time
from collections.abc import Callable

import torch

from foregate.checkpoint.store import ExpertKey
from foregate.kernels import Kernel, Work
from foregate.kernels.slots import Rows, SlotKernel
from foregate.memory.carrier import Carrier
from foregate.memory.device import Device
from foregate.memory.host import HostRecords
from foregate.schedule import Costs

KEY: ExpertKey = (0, 0)  # the record that is used, and slot 0, in which nothing lies yet
TOKENS = 4  # for what a further token takes
REPEATS = 3  # the fastest counts


def measure_costs(
    device: Device,
    carrier: Carrier,
    records: HostRecords,
    slot_kernel: SlotKernel,
    host_kernel: Kernel,
    dtype: torch.dtype,
) -> Costs:
    """The times of one expert of the first layer, whose kernels these are; nothing may be under way.

    dtype: of the hidden states on the device. A paced link counts as it is unpaced.
    """
    load = _fastest(lambda: _carry(carrier, records.record_bytes(KEY)))
    one, several = (_on_host(records, slot_kernel, host_kernel, tokens) for tokens in (1, TOKENS))
    further = max(several - one, 0.0) / (TOKENS - 1)
    return Costs(load, _on_device(device, slot_kernel, dtype), one, further)


def _carry(carrier: Carrier, nbytes: int) -> None:
    for start in range(0, nbytes, carrier.chunk_bytes):
        carrier.carry(KEY, 0, start, min(carrier.chunk_bytes, nbytes - start))
    carrier.check(KEY, 0)


def _on_host(records: HostRecords, slot_kernel: SlotKernel, kernel: Kernel, tokens: int) -> float:
    """Seconds of one expert for so many tokens on the host."""
    hidden, rows = torch.zeros(tokens, _hidden_size(slot_kernel)), torch.arange(tokens)
    outputs = torch.empty_like(hidden)
    with records.hold(KEY) as record:
        work = [Work(kernel.prepare(slot_kernel.layout.unpack(record[: slot_kernel.layout.nbytes])), rows, rows)]
        return _fastest(lambda: kernel.run(hidden, work, outputs))


def _on_device(device: Device, kernel: SlotKernel, dtype: torch.dtype) -> float:
    """Seconds of one expert for one token on the device, with the way back to the host."""
    hidden = torch.zeros(1, _hidden_size(kernel), dtype=dtype, device=device.torch_device)
    outputs, row = (
        torch.empty_like(hidden, dtype=torch.float32),
        torch.zeros(1, dtype=torch.int32, device=device.torch_device),
    )

    def compute() -> None:
        kernel.run(hidden, Rows(row, row, row), outputs, grouped=False)
        device.to_host(row).wait()

    return _fastest(compute)


def _hidden_size(kernel: SlotKernel) -> int:
    return next(param.shape[0] for param in kernel.layout.params if param.name == "down_proj")


def _fastest(work: Callable[[], None]) -> float:
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
