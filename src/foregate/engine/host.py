"""The step on the CPU: slots in host memory, records on disk. `_run_layer` is a decode step's layer, top to bottom."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from foregate.checkpoint.store import ExpertKey
from foregate.engine.base import Engine, places_by_expert
from foregate.kernels import Kernel, Work
from foregate.memory.carrier import Carrier
from foregate.memory.disk import DiskToHost
from foregate.memory.slots import SlotMemory


class HostEngine(Engine):
    """Slots in host memory, records on disk."""

    _kernels: Sequence[Kernel] = ()  # one a layer
    _alike: Sequence[int] = ()  # for each layer the first one whose kernel takes a slot in the same way

    def connect(self, modules: list[nn.Module]) -> None:
        self._kernels = [self.kernel(module, self.exact) for module in modules]
        ways = [(info.layout, kernel.way) for info, kernel in zip(self.store.layers, self._kernels, strict=True)]
        self._alike = [ways.index(way) for way in ways]

    def _run_layer(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        top_k = top_k_index.shape[-1]
        waiting = places_by_expert(top_k_index, self.store.layers[layer].num_experts)
        outputs = hidden.new_zeros(hidden.shape[0] * top_k, hidden.shape[1])

        self._route(layer, list(waiting), tokens=hidden.shape[0])
        self._predict(layer, top_k_index)
        while waiting:
            ready = self._await_resident(layer, waiting)
            places = {expert: waiting.pop(expert) for expert in ready}
            work = [Work(self._expert((layer, e)), tokens, rows) for e, (tokens, rows) in places.items()]
            start = time.perf_counter()
            self._kernels[layer].run(hidden, work, outputs)
            self.recorder.computed(layer, len(work), time.perf_counter() - start)
            self._release(layer, ready)
        return weighted_sum(outputs.view(-1, top_k, hidden.shape[1]), top_k_weights)

    def _expert(self, key: ExpertKey) -> Any:
        layer, slot = key[0], self.scheduler.slot(key)
        prepared_for, expert = self._prepared.get(slot, (None, None))
        if prepared_for != self._alike[layer]:
            layout = self.store.layers[layer].layout
            expert = self._kernels[layer].prepare(layout.unpack(self._memory.record(slot, layout.nbytes)))
            self._prepared[slot] = (self._alike[layer], expert)
        return expert

    def _make_slots(self) -> Carrier:
        self._memory = SlotMemory(self.scheduler.slots, self.budget.slot_bytes)
        self._prepared: dict[int, tuple[int, Any]] = {}  # slot -> (of `_alike`, what the kernel made of it)
        return DiskToHost(self.store, self._memory)


def weighted_sum(outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over k of outputs [tokens, k, hidden] * weights [tokens, k], always in the order of k. Changes `outputs`."""
    first, *others = outputs.mul_(weights.to(outputs.dtype).unsqueeze(-1)).unbind(1)
    total = first.clone()
    for part in others:
        total += part
    return total
