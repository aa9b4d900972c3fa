"""The recorder: the engine tells it what happens, it counts. What it keeps does not grow with the run."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import TypeVar

from foregate.memory.link import Finished
from foregate.report.foresight import Foresight
from foregate.report.prefetches import PrefetchCounts, PrefetchLedger
from foregate.report.timeline import Timeline
from foregate.schedule import Load, Prediction

Counts = TypeVar("Counts", "LayerCounts", PrefetchCounts)


@dataclass
class LayerCounts:
    """One MoE layer's traffic. Experts are counted once per layer call, however many tokens chose them."""

    hits: int = 0
    misses: int = 0  # not resident when routed; prefetches under way are among them
    bytes_read: int = 0
    stall_seconds: float = 0.0  # compute stood still for a load
    kernel_calls: int = 0
    experts_computed: int = 0
    kernel_seconds: float = 0.0  # on a card: of launching
    experts_on_host: int = 0  # computed there, and not by a kernel of the device
    host_seconds: float = 0.0


class Recorder:
    """Counts what an engine does. `experts`: how many each MoE layer has."""

    def __init__(self, experts: Sequence[int]) -> None:
        self.experts = tuple(experts)
        self.timeline: Timeline | None = None
        self.reset()

    def reset(self) -> None:
        """Start counting anew. Prefetches of before that were not used yet no longer count as any."""
        self.layers = [LayerCounts() for _ in self.experts]
        self.chosen = [[0] * count for count in self.experts]  # calls of its layer that used an expert
        self.missed = [[0] * count for count in self.experts]  # those that did not find it resident
        self.foresight = Foresight(len(self.experts))
        self._ledger = PrefetchLedger(len(self.experts))

    def record_timeline(self, limit: int) -> None:
        """Keep the last `limit` events with their times from now on."""
        self.timeline = Timeline(limit)

    # -- what the engine tells ------------------------------------------------------------------------------------

    def routed(
        self, layer: int, experts: Sequence[int], resident: Iterable[int], tokens: int, on_host: Collection[int] = ()
    ) -> None:
        """The router of `layer` chose `experts` (distinct) for so many tokens; `resident` of them need no load, nor do
        those that are computed `on_host`."""
        counts, chosen, missed = self.layers[layer], self.chosen[layer], self.missed[layer]
        present = set(resident)
        counts.hits += len(present)
        counts.misses += len(experts) - len(present)
        for expert in experts:
            chosen[expert] += 1
            if expert not in present:
                missed[expert] += 1
        self._ledger.routed(layer, (expert for expert in experts if expert not in on_host))
        self.foresight.routed(layer, experts, tokens)
        if self.timeline and layer == 0:
            self.timeline.passed(tokens)

    def predicted(self, prediction: Prediction) -> None:
        """The scheduler is told this."""
        self.foresight.predicted(prediction)
        if self.timeline:
            self.timeline.predicted(prediction)

    def submitted(self, load: Load) -> None:
        """The link was given a load. What its slot held is gone."""
        self._ledger.submitted(load)
        if self.timeline:
            self.timeline.submitted(load)

    def loaded(self, finished: Finished) -> None:
        """A load has ended, well or not."""
        self.layers[finished.key[0]].bytes_read += finished.nbytes
        kind = self._ledger.ended(finished)
        if self.timeline:
            self.timeline.loaded(finished.key, kind)

    def emptied(self) -> None:
        """All slots were given up."""
        self._ledger.emptied()

    def stalled(self, layer: int, seconds: float) -> None:
        """Compute stood still for a load, until now."""
        self.layers[layer].stall_seconds += seconds
        if self.timeline:
            self.timeline.stalled(layer, seconds)

    def computed(self, layer: int, experts: int, seconds: float) -> None:
        """The kernel computed so many experts, until now."""
        counts = self.layers[layer]
        counts.kernel_calls += 1
        counts.experts_computed += experts
        counts.kernel_seconds += seconds
        if self.timeline:
            self.timeline.computed(layer, experts, seconds)

    def computed_on_host(self, layer: int, experts: int, seconds: float) -> None:
        """The host computed so many experts beside the device, until now."""
        counts = self.layers[layer]
        counts.experts_on_host += experts
        counts.host_seconds += seconds

    # -- what it knows --------------------------------------------------------------------------------------------

    @property
    def prefetches(self) -> list[PrefetchCounts]:
        """What became of prefetches, by layer."""
        return self._ledger.layers

    def totals(self) -> LayerCounts:
        """All layers together."""
        return total(self.layers, LayerCounts)


def total(counts: Iterable[Counts], kind: type[Counts]) -> Counts:
    """The sum of counts, field by field."""
    return kind(*(sum(values) for values in zip(*map(astuple, counts), strict=True)))
