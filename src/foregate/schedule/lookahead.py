"""`lookahead`: one estimate for eviction and prefetch, the time until an expert is used next, fed by the gates.

For every expert it is d, the layer calls until its layer runs again, plus L times the expected number of tokens that
pass it by. The latter comes from the reuse heads or from decayed frequency, whichever has been right more often, and is
corrected by what the gates say of the layer's next call. The record whose next use is farthest leaves first; the absent
one whose next use is nearest is fetched when the link has room, if that is expected to save time and nothing that is
needed sooner has to go for it. docs/scheduling.md derives the rules and justifies the constants.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from foregate.schedule.base import Action, ExpertKey, Prediction, Scheduler, Shape
from foregate.schedule.estimates import Calibration, Pace, ReuseEstimate, Worth


class LookaheadScheduler(Scheduler):
    """See the module's description. Without predictions it evicts by decayed frequency and fetches nothing ahead."""

    def __init__(self, slots: int, shape: Shape) -> None:
        super().__init__(slots, shape)
        layers, size = range(shape.layers), (shape.layers, max(shape.experts))
        self._distance = np.array([[(layer - at - 1) % shape.layers + 1.0 for layer in layers] for at in layers])
        self._evictable = np.zeros(size, bool)
        self._likely = np.zeros(size)  # probability of a use by the layer's next call, where gates have spoken
        self._ahead: dict[
            int, list[np.ndarray]
        ] = {}  # layers whose next call gates have spoken of -> calibration cells
        self._candidates: list[ExpertKey] = []  # worth a prefetch, the next one last
        self._time: np.ndarray | None = None  # expected layer calls until the next use; None: not up to date
        self._reuse = ReuseEstimate(shape)
        self._calibration = Calibration(2 * shape.layers)  # the token source has horizons of its own
        self._pace, self._worth = Pace(), Worth()
        self._layer = shape.layers - 1  # that was routed last

    # -- events ---------------------------------------------------------------------------------------------------

    def routed(self, layer: int, experts: Iterable[int], now: float = 0.0, tokens: int = 1) -> list[Action]:
        experts = list(experts)
        self._layer, self._time = layer, None
        self._pace.layer_call(now)
        if layer == 0:
            self._worth.next_token()
        self._learn(layer, experts, tokens)
        self._evictable[layer, experts] = False
        self._candidates = [key for key in self._candidates if key[0] != layer]
        actions = self._give_up_stale(layer, set(experts))
        in_time, late = self.prefetches.in_time, self.prefetches.late
        actions += super().routed(layer, experts, now, tokens)
        saved = (self.prefetches.in_time - in_time) + (self.prefetches.late - late) / 2
        self._worth.saved(saved * self._pace.load_seconds)
        return actions

    def predicted(self, prediction: Prediction, now: float = 0.0) -> list[Action]:
        self._worth.spent(prediction.seconds)
        if prediction.reuse is not None:
            self._reuse.predicted(prediction.layer, prediction.reuse)
        first = self.shape.layers if prediction.token else 0
        corrected = self._calibration.correct([given for _, given in prediction.ahead], first)
        for (target, given), (likely, cells) in zip(prediction.ahead, corrected, strict=True):
            self._likely[target, : len(given)] = likely
            self._ahead.setdefault(target, []).append(cells)
        self._time = None
        self._candidates = self._worth_fetching()
        return self._go_on(now)

    def arrived(self, key: ExpertKey, seconds: float = 0.0, now: float = 0.0) -> list[Action]:
        self._pace.load(seconds)
        self._evictable[key] = key not in self._needed
        return super().arrived(key, seconds, now)

    def computed(self, key: ExpertKey, now: float = 0.0) -> list[Action]:
        self._evictable[key] = True
        return super().computed(key, now)

    def waited(self, seconds: float) -> None:
        self._pace.waited(seconds)
        self._worth.waited(seconds)

    def wants_predictions(self) -> bool:
        return self._worth.listening

    def facts(self) -> dict[str, Any]:
        return {
            **self._worth.facts(),
            "load_seconds": self._pace.load_seconds,
            "layer_seconds": self._pace.layer_seconds,
            "reuse_by": self._reuse.source,
        }

    # -- decisions ------------------------------------------------------------------------------------------------

    def victim(self) -> ExpertKey | None:
        index = int(np.where(self._evictable, self._times(), -1.0).argmax())
        key = divmod(index, self._evictable.shape[1])
        return key if self._evictable[key] else None

    def next_prefetch(self, now: float) -> ExpertKey | None:
        while self._candidates and self._candidates[-1] in self._slot_of:
            self._candidates.pop()
        return self._candidates[-1] if self._candidates else None

    def prefetch_slot(self, key: ExpertKey) -> int | None:
        if not self._free:
            victim = self.victim()
            if victim is None or self._times()[victim] <= self._times()[key]:
                return None
            self._evict(victim)
        return self._free.pop()

    def evicted(self, key: ExpertKey) -> None:
        self._evictable[key] = False

    def _worth_fetching(self) -> list[ExpertKey]:
        """What gates expect, is absent and worth a load; the one whose next use is nearest comes last."""
        targets = list(self._ahead)
        least = self._pace.least_probability(self._distance[self._layer, targets])
        rows, experts = np.nonzero(self._likely[targets] >= least[:, None])
        times = self._times()
        found = [(targets[row], expert) for row, expert in zip(rows.tolist(), experts.tolist(), strict=True)]
        return sorted((key for key in found if key not in self._slot_of), key=lambda key: -times[key])

    def _give_up_stale(self, layer: int, chosen: set[int]) -> list[Action]:
        """Cancel prefetches for this very call that it does not use."""
        return self.cancel(
            [
                key
                for key, demand in self._loading.items()
                if key[0] == layer and not demand and key[1] not in chosen and key not in self._dropping
            ]
        )

    # -- estimates ------------------------------------------------------------------------------------------------

    def _learn(self, layer: int, experts: list[int], tokens: int) -> None:
        """Compare what was expected of this call with what came. A call for several tokens says nothing about it."""
        chosen = np.zeros(self.shape.experts[layer])
        chosen[experts] = 1.0
        cells = self._ahead.pop(layer, None)
        if cells and tokens == 1:
            self._calibration.learn(cells, chosen)
        self._reuse.routed(layer, chosen, tokens)

    def _times(self) -> np.ndarray:
        if self._time is None:
            passes = self._reuse.passes.copy()
            for target in self._ahead:  # not used by the next call, it will be passed by as often as it would be else
                passes[target] *= (1 - self._likely[target]) / (1 - self._reuse.soon[target])
            self._time = self._distance[self._layer][:, None] + self.shape.layers * passes
        return self._time
