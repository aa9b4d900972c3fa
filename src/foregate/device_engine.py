"""The step on a device: slots in its memory, records in host memory, and as few words between the two as possible.

The host learns which experts were chosen by one small copy, for which it waits once a layer; not at all while all experts
of the layer are resident. What it launches then is read from slots that nothing can be loaded into before the device is
through with them.
"""

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from foregate.checkpoint.store import Store
from foregate.costs import measure_costs
from foregate.engine import Engine, places_by_expert
from foregate.host_experts import HostExperts
from foregate.kernels.slots import Rows, SlotKernel, SlotReference, choose_slot_kernel
from foregate.memory.budget import Budget
from foregate.memory.carrier import Carrier
from foregate.memory.device import Device, HostCopy
from foregate.memory.host import HostRecords
from foregate.memory.upload import HostToDevice
from foregate.schedule import Action, Compute, Load, Placement, Route, Scheduler

GROUPED_TOKENS = 16  # from so many on, experts share their weights among tokens: one token's rounding, two kernels
HOST_TOKENS = 8  # calls of more tokens are computed on the device alone: a processor gains nothing there
GATE_TOKENS = 64  # of a call's end, that gates are told of: a prompt's other tokens say little more


@dataclass(frozen=True)
class _Sent:
    """A call of a layer, and what of it is on its way to the host."""

    layer: int
    tokens: int
    copy: HostCopy  # of the choice [tokens, k], hidden states where the host may compute, what routers saw
    hidden: bool  # whether hidden states are among it


class DeviceEngine(Engine):
    """Slots on `device`, records in host memory. `exact`: the host computes no experts, so that the output is the same
    bit for bit whatever is resident; otherwise placement decides, and results differ by rounding.
    """

    def __init__(
        self,
        store: Store,
        budget: Budget,
        device: Device,
        records: HostRecords,
        *,
        policy: str,
        readers: int,
        kernel: str,
        exact: bool,
        future: Sequence[Route] | None = None,
    ) -> None:
        self.device, self._records, self._kernel_name = device, records, kernel
        self._kernels: list[SlotKernel] = []  # one a layer
        self._tables: dict[int, tuple[int, torch.Tensor]] = {}  # layer -> (loads so far, its experts' slots)
        self._loads = 0  # submitted so far: while there is no new one, slots stay as they are
        self._pending: deque[_Sent] = deque()  # computed, and the scheduler does not know of it yet
        self._placement: Placement | None = None
        super().__init__(
            store,
            budget,
            policy=policy,
            readers=readers,
            kernel=SlotReference.name if kernel == SlotReference.name else "auto",
            exact=exact,
            link_bandwidth=device.bandwidth,
            link_latency=device.latency,
            future=future,
        )
        self._host = HostExperts(store.layers, records, self.kernel)

    def connect(self, modules: list[nn.Module]) -> None:
        layers = zip(modules, self.store.layers, strict=True)
        self._kernels = [
            choose_slot_kernel(self._kernel_name, module, layer.layout, self._slots) for module, layer in layers
        ]
        self._host.connect(modules)
        if not self.exact:
            costs = measure_costs(self.device, self._carrier, self._records, self._kernels[0], self.kernel(modules[0], False))
            self._placement = Placement(costs, self._reserve)
            self.scheduler.placement = self._placement

    @property
    def kernel_summary(self) -> str:
        notes = dict.fromkeys(f"{kernel.name} ({kernel.note})" for kernel in self._kernels)
        return "; ".join(notes)

    @property
    def device_facts(self) -> dict[str, Any]:
        host = {"path": self._link.path, "records_in_host_memory": self._records.slots}
        placement = None if self._placement is None else self._placement.facts()
        return {"name": self.device.name, **host, "placement": placement}

    def close(self) -> None:
        super().close()
        self._host.close()
        self._records.close()

    # -- the step -------------------------------------------------------------------------------------------------

    def _run_layer(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        top_k, kernel, grouped = top_k_index.shape[-1], self._kernels[layer], len(hidden) >= GROUPED_TOKENS
        weights, total = top_k_weights.float().contiguous(), torch.empty_like(hidden)
        sent = self._send(layer, hidden, top_k_index)
        if (table := self._complete(layer)) is not None:
            self._compute_all(kernel, hidden, _look_up(table, top_k_index), weights, total, grouped)
            self._pending.append(sent)
            return total

        self._catch_up()
        outputs = torch.empty(len(hidden) * top_k, hidden.shape[1], device=hidden.device)
        waiting = self._account(sent, top_k)
        while waiting:
            ready = self._await_resident(layer, waiting)
            rows = self._rows(layer, {expert: waiting.pop(expert) for expert in ready}, top_k)
            start = time.perf_counter()
            kernel.run(hidden, rows, outputs, grouped)
            self.recorder.computed(layer, len(ready), time.perf_counter() - start)
            self._release(layer, ready)
        self._take_from_host(layer, outputs)
        kernel.combine(outputs, self._chosen(layer, top_k_index), weights, total)
        return total
