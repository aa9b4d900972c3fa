"""The step on a device: slots in its memory, records in host memory, and as few words between the two as possible.

The host learns which experts were chosen by one small copy, for which it waits once a layer; not at all while all experts
of the layer are resident. What it launches then is read from slots that nothing can be loaded into before the device is
through with them.
"""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from foregate.checkpoint.store import ExpertKey, Store
from foregate.engine.base import Engine, Places, places_by_expert
from foregate.engine.costs import measure_costs
from foregate.engine.host_experts import HostExperts
from foregate.kernels.slots import Rows, SlotKernel, SlotReference, choose_slot_kernel
from foregate.memory.budget import Budget
from foregate.memory.carrier import Carrier
from foregate.memory.device import Device, HostCopy
from foregate.memory.host import HostRecords
from foregate.memory.upload import HostToDevice
from foregate.schedule import Action, Compute, Costs, Load, Placement, Prediction, Route, Scheduler

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


@dataclass(frozen=True)
class _Table:
    """The slots of all experts of a layer. Right while no further load has started."""

    loads: int  # that had started
    slots: list[int]
    on_device: torch.Tensor  # int32 [experts + 1]; the last is -1, for no expert


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
        dtype: torch.dtype,
        link_bandwidth: float | None,
        link_latency: float,
        future: Sequence[Route] | None,
    ) -> None:
        self.device, self.dtype, self._records, self._kernel_name = device, dtype, records, kernel
        self._kernels: list[SlotKernel] = []  # one a layer
        self._chosen: list[torch.Tensor] = []  # by layer, as a table: 0 for its experts, -1 for none
        self._slots: torch.Tensor | None = None
        self._tables: dict[int, _Table] = {}  # by layer
        self._loads = 0  # started so far
        self._pending: deque[_Sent] = deque()  # computed, and the scheduler does not know of it yet
        self._on_host: list[ExpertKey] = []  # that the host is to compute of the layer at work
        self._hidden_sent = False  # whether the host has what it needs to compute
        self._placement: Placement | None = None
        super().__init__(
            store,
            budget,
            policy=policy,
            readers=readers,
            kernel=SlotReference.name if kernel == SlotReference.name else "auto",
            exact=exact,
            link_bandwidth=link_bandwidth,
            link_latency=link_latency,
            future=future,
        )
        self._host = HostExperts(store.layers, records, self.kernel)

    @classmethod
    def open(
        cls,
        store: Store,
        budget: Budget,
        device: Device,
        *,
        readers: int,
        **settings: Any,
    ) -> "DeviceEngine":
        """An engine with host memory of its own for records, as many as `budget.host` says.

        settings: as the constructor's. Raises ForegateError where memory cannot be had, here or there.
        """
        host = budget.host
        limit = host.records * host.record_bytes if host.records < store.num_experts else None
        records = HostRecords(store, device, limit, readers=readers)
        try:
            return cls(store, budget, device, records, readers=readers, **settings)
        except BaseException:
            records.close()
            raise

    def fill(self) -> None:
        """Read records into host memory, as many as fit. Raises ForegateError, which names one that cannot be read."""
        self._records.fill()

    def connect(self, modules: list[nn.Module]) -> None:
        for module, layer in zip(modules, self.store.layers, strict=True):
            kernel = choose_slot_kernel(self._kernel_name, module, layer.layout, self._slots)
            kernel.prepare(self.dtype, layer.top_k)
            self._kernels.append(kernel)
            self._chosen.append(self._to_device([0] * layer.num_experts + [-1]))
        self._host.connect(modules)
        if not self.exact:
            costs = self._measure_costs()
            self._placement = self.scheduler.placement = Placement(costs, self._reserve)

    @property
    def kernel_summary(self) -> str:
        notes = dict.fromkeys(f"{kernel.name} ({kernel.note})" for kernel in self._kernels)
        return "; ".join(notes)

    @property
    def device_facts(self) -> dict[str, Any]:
        bits = self.store.manifest.backbone_bits
        matrices = f", {bits}-bit matrices dequantized" if self.store.matrices else ""
        steps = "eager" if self.backbone is None else self.backbone.note
        return {
            "name": self.device.name,
            "path": self._link.path,
            "backbone": f"{str(self.dtype).removeprefix('torch.')}{matrices}, {steps}",
            "records_in_host_memory": self._records.slots,
            "placement": None if self._placement is None else self._placement.facts(),
        }

    def close(self) -> None:
        with self._turn:
            if not self._closed:
                super().close()
                self._host.close()
                self._records.close()

    def settle(self) -> None:
        with self._turn:
            try:
                self._catch_up(0)
            except BaseException:
                self._start_anew()
                raise

    def expect(self, prediction: Prediction) -> None:
        with self._turn:  # no load may start between a look at the slots and the launch that reads them
            super().expect(prediction)

    # -- the step -------------------------------------------------------------------------------------------------

    def _run_layer(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        top_k, kernel, grouped = top_k_index.shape[-1], self._kernels[layer], len(hidden) >= GROUPED_TOKENS
        index, weights = top_k_index.reshape(-1, top_k), top_k_weights.float().contiguous()
        total = torch.empty_like(hidden)
        sent = self._send(layer, hidden, index)
        if (table := self._complete_table(layer)) is not None:
            compute_all(kernel, hidden, _look_up(table.on_device, index), weights, total, grouped)
            self._carrier.used(table.slots)
            self._pending.append(sent)
            self._catch_up(len(self._kernels))
            return total

        self._catch_up(0)
        outputs = hidden.new_empty(len(hidden) * top_k, hidden.shape[1], dtype=torch.float32)
        waiting = self._route_sent(sent)
        while waiting:
            ready = self._await_resident(layer, waiting)
            slots = [self.scheduler.slot((layer, expert)) for expert in ready]
            rows = self._rows(slots, [waiting.pop(expert) for expert in ready])
            start = time.perf_counter()
            kernel.run(hidden, rows, outputs, grouped)
            self.recorder.computed(layer, len(ready), time.perf_counter() - start)
            self._carrier.used(slots)
            self._release(layer, ready)
        self._take_from_host(layer, outputs)
        kernel.combine(outputs, _look_up(self._chosen[layer], index), weights, total)
        return total

    def _send(self, layer: int, hidden: torch.Tensor, chosen: torch.Tensor) -> _Sent:
        """Start everything of this call that the host needs on its way there."""
        seen = () if self._predictor is None else self._predictor.take(layer)
        placed = self._placement is not None and len(hidden) <= HOST_TOKENS
        tensors = [chosen, *([hidden] if placed else ()), *(part[-GATE_TOKENS:] for part in seen)]
        return _Sent(layer, len(hidden), self.device.to_host(*tensors), placed)

    def _complete_table(self, layer: int) -> _Table | None:
        """Where all experts of the layer lie, if they are resident and nothing is on its way that could change that."""
        with self._state:
            if self._failure is not None:
                raise self._failure
            if not self.scheduler.is_complete(layer):
                return None
            table = self._tables.get(layer)
            if table is None or table.loads != self._loads:
                experts = range(self.store.layers[layer].num_experts)
                slots = [self.scheduler.slot((layer, expert)) for expert in experts]
                table = self._tables[layer] = _Table(self._loads, slots, self._to_device([*slots, -1]))
            return table

    def _route_sent(self, sent: _Sent) -> dict[int, Places]:
        """Tell the scheduler of a call, and start what the host is to compute. Returns the places of the others.

        This waits for the device, the only time in a layer.
        """
        layer, (chosen, *seen) = sent.layer, sent.copy.wait()
        hidden = seen.pop(0) if sent.hidden else None
        places = places_by_expert(chosen, self.store.layers[layer].num_experts)
        self._hidden_sent = sent.hidden
        self._route(layer, list(places), sent.tokens)
        on_host = {expert: places.pop(expert) for _, expert in self._on_host}
        self._on_host.clear()
        if hidden is not None and on_host:
            self._host.start(layer, hidden, on_host)
        self._predict_sent(layer, chosen, seen)
        return places

    def _catch_up(self, most: int) -> None:
        """Tell the scheduler of calls that were computed without asking it, until at most so many are left.

        What was evicted since, by an earlier one of them, need not come back.
        """
        while len(self._pending) > most:
            sent = self._pending.popleft()
            layer, (chosen, *seen) = sent.layer, sent.copy.wait()
            named = set(chosen.flatten().tolist()).intersection(range(self.store.layers[layer].num_experts))
            with self._state:  # no load that ends in between may evict one of them
                experts = self._resident(layer, sorted(named))
                self._route(layer, experts, sent.tokens)
            self._predict_sent(layer, chosen, seen[1:] if sent.hidden else seen)
            self._release(layer, experts)

    def _predict_sent(self, layer: int, chosen: torch.Tensor, seen: Sequence[torch.Tensor]) -> None:
        if self._predictor is not None:
            self._predictor.give(layer, seen)
            self._predict(layer, chosen)

    def _take_from_host(self, layer: int, outputs: torch.Tensor) -> None:
        result = self._host.take()
        if result is None:
            return
        rows, values = (part.to(outputs.device, non_blocking=True) for part in (result.rows, result.values))
        outputs[rows] = values
        self.recorder.computed_on_host(layer, result.experts, result.seconds)
        with self._state:
            self._placement.computed(result.experts, len(result.rows) / result.experts, result.seconds)

    # -- slots ----------------------------------------------------------------------------------------------------

    def _rows(self, slots: Sequence[int], places: Sequence[Places]) -> Rows:
        """Work on the device: the expert in slots[i] at places[i]. One small copy, which nobody waits for."""
        tokens, rows = (torch.cat(parts) for parts in zip(*places, strict=True))
        own = torch.tensor(slots).repeat_interleave(torch.tensor([len(place.rows) for place in places]))
        return Rows(*self._to_device(torch.stack([own, tokens, rows])))

    def _to_device(self, numbers: torch.Tensor | list[int]) -> torch.Tensor:
        return torch.as_tensor(numbers, dtype=torch.int32).to(self.device.torch_device, non_blocking=True)

    def _reserve(self, key: ExpertKey) -> bool:
        return self._hidden_sent and self._host.reserve(key)

    def _carry_out(self, actions: Iterable[Action]) -> None:
        actions = list(actions)
        self._on_host += [action.key for action in actions if isinstance(action, Compute)]
        self._loads += sum(isinstance(action, Load) for action in actions)
        super()._carry_out(actions)

    def _make_slots(self) -> Carrier:
        if self._slots is None:
            self._slots = self.device.slots(self.scheduler.slots, self.budget.slot_bytes)
        else:
            self._carrier.close()  # what hangs can no longer write into them
        return HostToDevice(self._records, self.device, self._slots)

    def _new_scheduler(self) -> Scheduler:
        scheduler = super()._new_scheduler()
        scheduler.placement = self._placement
        return scheduler

    def _measure_costs(self) -> Costs:
        kernels = self._kernels[0], self._host.kernels[0]
        costs = measure_costs(self.device, self._carrier, self._records, *kernels, self.dtype)
        paced = self.store.record_bytes / self._link_bandwidth if self._link_bandwidth else 0.0
        return replace(costs, load=max(costs.load, paced) + self._link_latency)

    def _start_anew(self) -> None:
        self._carrier.used(range(self.scheduler.slots))  # whatever may have been launched
        self._host.drop()
        self._on_host.clear()
        self._pending.clear()
        super()._start_anew()


def _look_up(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The entries of experts in `index`. Whatever is out of their range is no expert, which is the table's last."""
    return table[index.clamp(-1, len(table) - 1)]


def compute_all(
    kernel: SlotKernel,
    hidden: torch.Tensor,
    slots: torch.Tensor,
    weights: torch.Tensor,
    total: torch.Tensor,
    grouped: bool,
) -> None:
    """total = what all chosen experts, in these slots, add. slots: int32 [tokens, k], the rest as in `SlotKernel`."""
    if not grouped:
        kernel.decode(hidden, slots, weights, total)
        return
    places = torch.arange(slots.numel(), dtype=torch.int32, device=slots.device)
    outputs = hidden.new_empty(slots.numel(), hidden.shape[1], dtype=torch.float32)
    kernel.run(hidden, Rows(slots.view(-1), places // slots.shape[1], places), outputs, grouped=True)
    kernel.combine(outputs, slots, weights, total)
