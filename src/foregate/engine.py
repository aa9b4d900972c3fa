"""The engine: runs one MoE layer at a time with its experts in slots. `_run_layer` is the step, top to bottom."""

import threading
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from foregate.checkpoint.store import ExpertKey, Store
from foregate.errors import ForegateError
from foregate.kernels import Kernel, Work, choose_kernel
from foregate.memory.budget import Budget
from foregate.memory.disk import DiskReader
from foregate.memory.slots import SlotMemory
from foregate.report import Recorder
from foregate.schedule import Load, make_scheduler

if TYPE_CHECKING:
    from foregate.lookahead.live import LiveGates


class Engine:
    """Ties scheduler, slots, reader and kernel together for one model.

    The output does not depend on policy or budget: they only decide when bytes move. One layer runs at a time,
    whichever thread asks.
    """

    def __init__(self, store: Store, budget: Budget, *, policy: str, readers: int, kernel: str, exact: bool) -> None:
        self.store, self.budget, self.policy, self.exact = store, budget, policy, exact
        self.kernel, self.kernel_note = choose_kernel(kernel)
        self.scheduler = make_scheduler(policy, budget.slots)
        self.recorder = Recorder(len(store.layers))
        self._readers = readers
        self._memory = SlotMemory(budget.slots, budget.slot_bytes)
        self._reader = DiskReader(store, self._memory, readers)
        self._kernels: list[Kernel] = []  # one a layer
        self._prepared: dict[int, tuple[int, Any]] = {}  # slot -> (layer, the slot as that layer's kernel takes it)
        self._gates: LiveGates | None = None
        self._lock = threading.Lock()

    def connect(self, modules: list[nn.Module]) -> None:
        """Tell the engine the model's experts modules, one a layer: they say how gate and up combine."""
        self._kernels = [self.kernel(module, self.exact) for module in modules]

    def follow(self, gates: "LiveGates") -> None:
        """Have the lookahead policy's scheduler told what these gates expect."""
        self._gates = gates

    @property
    def direct_reads(self) -> bool:
        """Whether records are read past the page cache."""
        return self._reader.direct

    def run_layer(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """What the routed experts of MoE layer `layer` add: sum over k of weight * expert(hidden).

        hidden: float32 [tokens, hidden]; top_k_index, top_k_weights: [tokens, k]. Returns [tokens, hidden]. Raises
        ForegateError when a record cannot be read; the next call then starts with empty slots.
        """
        with self._lock:
            try:
                return self._run_layer(layer, hidden.contiguous(), top_k_index, top_k_weights)
            except BaseException:
                self._empty_slots()
                raise

    def close(self) -> None:
        """End the reader threads. The model cannot run afterwards."""
        with self._lock:
            self._reader.close()

    def _run_layer(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        top_k = top_k_index.shape[-1]
        waiting = places_by_expert(top_k_index, self.store.layers[layer].num_experts)
        outputs = hidden.new_zeros(hidden.shape[0] * top_k, hidden.shape[1])

        self._record_routing(layer, waiting)
        if self._gates is not None:
            self._gates.routed(layer, top_k_index, self.scheduler)
        self._carry_out(self.scheduler.routed(layer, waiting))
        while waiting:
            ready = [expert for expert in waiting if self.scheduler.is_resident((layer, expert))]
            if not ready:  # nothing to compute until a load arrives
                self._await_load(layer)
                continue
            places = {expert: waiting.pop(expert) for expert in ready}
            work = [Work(self._expert((layer, e)), rows // top_k, rows) for e, rows in places.items()]
            self._kernels[layer].run(hidden, work, outputs)
            for expert in ready:
                self._carry_out(self.scheduler.computed((layer, expert)))
        return weighted_sum(outputs.view(-1, top_k, hidden.shape[1]), top_k_weights)

    def _carry_out(self, loads: list[Load]) -> None:
        for load in loads:
            self._reader.submit(load)

    def _await_load(self, layer: int) -> None:
        start = time.perf_counter()
        finished = self._reader.wait()
        self.recorder.stalled(layer, time.perf_counter() - start)
        if finished.error:
            raise finished.error
        self.recorder.loaded(layer, finished.nbytes)
        self._carry_out(self.scheduler.arrived(finished.key))

    def _expert(self, key: ExpertKey) -> Any:
        layer, slot = key[0], self.scheduler.slot(key)
        prepared_for, expert = self._prepared.get(slot, (None, None))
        if prepared_for != layer:
            layout = self.store.layers[layer].layout
            expert = self._kernels[layer].prepare(layout.unpack(self._memory.record(slot, layout.nbytes)))
            self._prepared[slot] = (layer, expert)
        return expert

    def _record_routing(self, layer: int, places: dict[int, torch.Tensor]) -> None:
        hits = sum(self.scheduler.is_resident((layer, expert)) for expert in places)
        self.recorder.routed(layer, hits, len(places) - hits)

    def _empty_slots(self) -> None:
        """After an error or an interruption: let loads in flight land, then forget what the slots hold."""
        try:
            while self._reader.in_flight:
                self._reader.wait()
        except ForegateError:  # the disk hangs: a late read must not land in memory that is used again
            self._reader.close_later()
            self._memory = SlotMemory(self.budget.slots, self.budget.slot_bytes)
            self._reader = DiskReader(self.store, self._memory, self._readers)
        self._prepared.clear()
        self.scheduler = make_scheduler(self.policy, self.budget.slots)


def places_by_expert(top_k_index: torch.Tensor, num_experts: int) -> dict[int, torch.Tensor]:
    """For each chosen expert, ascending: where it was chosen, as positions in the flattened [tokens, k] index.

    Indices outside 0..num_experts-1 are a family's way to say "no expert" and are left out.
    """
    flat = top_k_index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    chosen, counts = torch.unique_consecutive(flat[order], return_counts=True)
    groups = zip(chosen.tolist(), order.split(counts.tolist()), strict=True)
    return {expert: rows for expert, rows in groups if 0 <= expert < num_experts}


def weighted_sum(outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over k of outputs [tokens, k, hidden] * weights [tokens, k], always in the order of k."""
    weights = weights.to(outputs.dtype).unsqueeze(-1)
    total = outputs[:, 0] * weights[:, 0]
    for rank in range(1, outputs.shape[1]):
        total += outputs[:, rank] * weights[:, rank]
    return total
