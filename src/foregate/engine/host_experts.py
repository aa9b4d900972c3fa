"""Experts computed on the host, in the background, from records that lie in host memory: placement's other place."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from foregate.checkpoint.store import ExpertKey, LayerInfo
from foregate.engine.base import Places
from foregate.kernels import Kernel, Work
from foregate.memory.host import HostRecords


@dataclass(frozen=True)
class HostResult:
    """What the host has computed of one layer."""

    rows: torch.Tensor  # int64 [n], places in the layer's outputs
    values: torch.Tensor  # float32 [n, hidden]
    experts: int
    seconds: float


class HostExperts:
    """Computes experts of one layer at a time while the device and the link work.

    A record that was reserved stays in host memory until it was computed, or until `drop`. Nobody may wait for a load
    between `reserve` and `start`: the load may wait for the record's room.
    """

    def __init__(self, layers: Sequence[LayerInfo], records: HostRecords, kernel: type[Kernel]) -> None:
        self._layers, self._records, self._kernel = layers, records, kernel
        self.kernels: list[Kernel] = []  # one a layer
        self._worker = ThreadPoolExecutor(1, "host-experts")
        self._held: dict[int, torch.Tensor] = {}  # records of one layer
        self._holding = ExitStack()
        self._under_way: Future[HostResult] | None = None

    def connect(self, modules: Sequence[nn.Module]) -> None:
        """The model's experts modules, one a layer."""
        self.kernels = [self._kernel(module, exact=False) for module in modules]

    def reserve(self, key: ExpertKey) -> bool:
        """Keep a record for the layer to come; False when host memory does not have it."""
        with ExitStack() as stack:
            record = stack.enter_context(self._records.hold(key))
            if record is None:
                return False
            self._held[key[1]] = record
            self._holding.enter_context(stack.pop_all())
            return True

    def start(self, layer: int, hidden: torch.Tensor, places: Mapping[int, Places]) -> None:
        """Begin with the reserved experts of `layer`. hidden: [tokens, hidden] in host memory; places: by expert."""
        held, holding = self._held, self._holding
        self._held, self._holding = {}, ExitStack()

        def compute() -> HostResult:
            with holding:
                return self._compute(layer, hidden, [(held[expert], place) for expert, place in places.items()])

        self._under_way = self._worker.submit(compute)

    def take(self) -> HostResult | None:
        """The results of the layer that was started, once they are there; None when none was."""
        if self._under_way is None:
            return None
        under_way, self._under_way = self._under_way, None
        return under_way.result()

    def drop(self) -> None:
        """Let go of everything: of what is being computed, once it is."""
        if self._under_way is not None:
            wait([self._under_way])
            self._under_way = None
        self._holding.close()
        self._held.clear()

    def close(self) -> None:
        """End the thread."""
        self._worker.shutdown()

    @torch.inference_mode()
    def _compute(self, layer: int, hidden: torch.Tensor, experts: list[tuple[torch.Tensor, Places]]) -> HostResult:
        start, kernel, layout = time.perf_counter(), self.kernels[layer], self._layers[layer].layout
        rows = torch.cat([place.rows for _, place in experts])
        values = torch.empty(len(rows), hidden.shape[1])
        to = torch.arange(len(rows)).split([len(place.rows) for _, place in experts])
        work = [
            Work(kernel.prepare(layout.unpack(record[: layout.nbytes])), place.tokens, own)
            for (record, place), own in zip(experts, to, strict=True)
        ]
        kernel.run(hidden.float().contiguous(), work, values)
        return HostResult(rows, values, len(experts), time.perf_counter() - start)
