"""`lookahead`: one estimate for eviction and prefetch, the time until an expert is used next, fed by the gates.

For every expert it is d, the layer calls until its layer runs again, plus L times the expected number of tokens that
pass it by. The latter comes from the reuse heads or from decayed frequency, whichever has been right more often, and is
corrected by what the gates say of the layer's next call. The record whose next use is farthest leaves first; the absent
one whose next use is nearest is fetched when the link has room, if that is expected to save time and nothing that is
needed sooner has to go for it. docs/scheduling.md derives the rules and justifies the constants.
"""

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from foregate.schedule.base import Action, ExpertKey, Prediction, Scheduler, Shape
from foregate.schedule.estimates import Calibration, Pace, ReuseEstimate, Worth


class LookaheadScheduler(Scheduler):
    """See the module's description. Without predictions it evicts by decayed frequency and fetches nothing ahead."""

    def __init__(self, slots: int, shape: Shape) -> None:
        super().__init__(slots, shape)
        layers, size = range(shape.layers), (shape.layers, max(shape.experts))
        self._distance = np.array([[[(layer - at - 1) % shape.layers + 1.0] for layer in layers] for at in layers])
        self._evictable = np.zeros(size, bool)
        self._ahead: dict[int, list[np.ndarray]] = {}  # layer gates have spoken of -> cells of their probabilities
        self._candidates: list[ExpertKey] = []  # worth a prefetch, the next one last
        self._reuse = ReuseEstimate(shape)
        self._passes = self._reuse.passes.copy()  # the same with what gates say of the next call
        self._time = np.zeros(size)  # expected layer calls until the next use
        self._leaving = np.zeros(size)  # the same for what may be evicted, below 0 for what may not
        self._stale = True  # whether the latter two are out of date
        self._aims: dict[tuple[int, bool], _Aims] = {}  # by the source of a prediction
        self._calibration = Calibration(2 * shape.layers)  # the token source has horizons of its own
        self._pace, self._worth = Pace(), Worth()
        self._layer = shape.layers - 1  # that was routed last
        self._latest: tuple[_Aims, np.ndarray] | None = None  # the last prediction

    # -- events ---------------------------------------------------------------------------------------------------

    def routed(self, layer: int, experts: Iterable[int], now: float = 0.0, tokens: int = 1) -> list[Action]:
        experts = list(experts)
        self._layer, self._stale = layer, True
        self._pace.layer_call(now)
        if layer == 0:
            self._worth.next_token()
        chosen = np.array(experts, np.intp)
        self._learn(layer, chosen, tokens)
        self._evictable[layer][chosen] = False
        self._passes[layer] = self._reuse.passes[layer]
        self._candidates = [key for key in self._candidates if key[0] != layer]
        actions = self._give_up_stale(layer, experts) if self._loading else []
        in_time, late = self.prefetches.in_time, self.prefetches.late
        actions += super().routed(layer, experts, now, tokens)
        saved = (self.prefetches.in_time - in_time) + (self.prefetches.late - late) / 2
        self._worth.saved(saved * self._pace.load_seconds)
        return actions

    def predicted(self, prediction: Prediction, now: float = 0.0) -> list[Action]:
        self._worth.spent(prediction.seconds)
        if prediction.reuse is not None:
            self._reuse.predicted(prediction.layer, prediction.reuse)
            self._passes[prediction.layer] = self._reuse.passes[prediction.layer]
        if prediction.ahead:
            aims = self._aims_of(prediction)
            likely = self._listen(prediction, aims)
            self._stale = True
            self._candidates = self._worth_fetching(aims, likely)
            self._latest = aims, likely
        return self._go_on(now)

    def arrived(self, key: ExpertKey, seconds: float = 0.0, now: float = 0.0) -> list[Action]:
        self._pace.load(seconds)
        self._may_leave(key, key not in self._needed)
        return super().arrived(key, seconds, now)

    def computed(self, keys: Collection[ExpertKey], now: float = 0.0) -> list[Action]:
        for key in keys:
            self._may_leave(key, True)
        return super().computed(keys, now)

    def waited(self, seconds: float) -> None:
        self._pace.waited(seconds)
        self._worth.waited(seconds)

    def wants_predictions(self) -> bool:
        return self._worth.listening

    def expected(self) -> tuple[ExpertKey, ...]:
        if self._latest is None:
            return ()
        aims, likely = self._latest
        return tuple(aims.keys[place] for place in (likely >= 0.5).nonzero()[0].tolist())

    def facts(self) -> dict[str, Any]:
        return {
            **self._worth.facts(),
            "load_seconds": self._pace.load_seconds,
            "layer_seconds": self._pace.layer_seconds,
            "reuse_by": self._reuse.source,
        }

    # -- decisions ------------------------------------------------------------------------------------------------

    def victim(self) -> ExpertKey | None:
        self._refresh()
        key = divmod(int(self._leaving.argmax()), self._leaving.shape[1])
        return key if self._evictable[key] else None

    def next_prefetch(self, now: float) -> ExpertKey | None:
        while self._candidates and self._candidates[-1] in self._slot_of:
            self._candidates.pop()
        return self._candidates[-1] if self._candidates else self.load_for_later()

    def prefetch_slot(self, key: ExpertKey) -> int | None:
        if not self._free:
            victim = self.victim()
            if victim is None or self._time[victim] <= self._time[key]:
                return None
            self._evict(victim)
        return self._free.pop()

    def evicted(self, key: ExpertKey) -> None:
        self._may_leave(key, False)

    def worth_loading(self, keys: list[ExpertKey]) -> list[ExpertKey]:
        self._refresh()
        return sorted(keys, key=lambda key: self._time[key])

    def _worth_fetching(self, aims: "_Aims", likely: np.ndarray) -> list[ExpertKey]:
        """What a gate expects, is absent and worth a load; the one whose next use is nearest comes last."""
        distances = self._distance[self._layer]
        least = np.array([self._pace.least_probability(distances[target, 0]) for target in aims.targets])
        probable = (likely >= least[aims.rows]).nonzero()[0].tolist()
        found = [aims.keys[place] for place in probable if aims.keys[place] not in self._slot_of]
        if len(found) > 1:
            self._refresh()
            found.sort(key=lambda key: -self._time[key])
        return found

    def _give_up_stale(self, layer: int, chosen: list[int]) -> list[Action]:
        """Cancel prefetches for this very call that it does not use."""
        return self.cancel(
            [
                key
                for key, demand in self._loading.items()
                if key[0] == layer and not demand and key[1] not in chosen and key not in self._dropping
            ]
        )

    # -- estimates ------------------------------------------------------------------------------------------------

    def _learn(self, layer: int, experts: np.ndarray, tokens: int) -> None:
        """Compare what was expected of this call with what came. A call for several tokens says nothing about it."""
        cells = self._ahead.pop(layer, None)
        if cells and tokens == 1:
            self._calibration.learn(cells, experts)
        self._reuse.routed(layer, experts, tokens)

    def _aims_of(self, prediction: Prediction) -> "_Aims":
        source = prediction.layer, prediction.token
        if source not in self._aims:
            first = self.shape.layers if prediction.token else 0
            targets = [target for target, _ in prediction.ahead]
            self._aims[source] = _Aims(targets, self.shape.experts, first, self._passes.shape[1])
        return self._aims[source]

    def _listen(self, prediction: Prediction, aims: "_Aims") -> np.ndarray:
        """What a prediction is worth: its probabilities, corrected, side by side."""
        likely, cells = self._calibration.correct(
            np.concatenate([given for _, given in prediction.ahead]), aims.first_cells
        )
        for target, part in zip(aims.targets, aims.parts, strict=True):
            self._ahead.setdefault(target, []).append(cells[part])
        # not used by the next call, an expert will be passed by as often as it would be else
        passes = self._reuse.passes.ravel()[aims.places] * (1 - likely)
        self._passes.ravel()[aims.places] = passes / self._reuse.rest.ravel()[aims.places]
        return likely

    def _may_leave(self, key: ExpertKey, whether: bool) -> None:
        self._evictable[key] = whether
        self._leaving[key] = self._time[key] if whether else -1.0

    def _refresh(self) -> None:
        if self._stale:
            self._time = self._distance[self._layer] + self.shape.layers * self._passes
            self._leaving = np.where(self._evictable, self._time, -1.0)
            self._stale = False


class _Aims:
    """Where the values of a prediction belong that lie side by side, target after target."""

    def __init__(self, targets: list[int], experts: tuple[int, ...], first: int, width: int) -> None:
        self.targets = targets
        sizes = [experts[target] for target in targets]
        self.rows = np.repeat(np.arange(len(targets)), sizes)  # which target a value is about
        self.keys = [(target, expert) for target, size in zip(targets, sizes, strict=True) for expert in range(size)]
        self.places = np.array([target * width + expert for target, expert in self.keys])  # in [layers, experts]
        self.first_cells = Calibration.first_cells(first + self.rows)
        ends = np.cumsum(sizes).tolist()
        self.parts = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
