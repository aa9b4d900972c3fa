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
        self._absent, self._evictable = np.zeros(size, bool), np.zeros(size, bool)
        for layer, experts in enumerate(shape.experts):
            self._absent[layer, :experts] = True
        self._time = np.zeros(size)  # expected layer calls until the next use
        self._likely = np.zeros(size)  # probability of a use by the layer's next call, where gates have spoken
        self._ahead: dict[int, list[tuple[int, np.ndarray]]] = {}  # layer -> (horizon, what a gate said of its next call)
        self._reuse = ReuseEstimate(shape)
        self._calibration = Calibration(2 * shape.layers)  # the token source has horizons of its own
        self._pace, self._worth = Pace(), Worth()
        self._layer = shape.layers - 1  # that was routed last

    # -- events ---------------------------------------------------------------------------------------------------

    def routed(self, layer: int, experts: Iterable[int], now: float = 0.0, tokens: int = 1) -> list[Action]:
        experts = list(experts)
        chosen = np.zeros(self._time.shape[1])
        chosen[experts] = 1.0
        self._layer = layer
        self._pace.layer_call(now)
        if layer == 0:
            self._worth.next_token()
        self._learn(layer, chosen, tokens)
        self._evictable[layer, experts] = False
        self._estimate()
        stale = [key for key, demand in self._loading.items() if key[0] == layer and not demand and not chosen[key[1]]]
        in_time, late = self.prefetches.in_time, self.prefetches.late
        actions = self.cancel([key for key in stale if key not in self._dropping])
        actions += super().routed(layer, experts, now, tokens)
        saved = (self.prefetches.in_time - in_time) + (self.prefetches.late - late) / 2
        self._worth.saved(saved * self._pace.load_seconds)
        return actions

    def predicted(self, prediction: Prediction, now: float = 0.0) -> list[Action]:
        self._worth.spent(prediction.seconds)
        if prediction.reuse is not None:
            self._reuse.predicted(prediction.layer, prediction.reuse)
        first = self.shape.layers if prediction.token else 0
        for horizon, (target, probabilities) in enumerate(prediction.ahead, first):
            self._likely[target, : len(probabilities)] = self._calibration.correct(probabilities, horizon)
            self._ahead.setdefault(target, []).append((horizon, probabilities))
        self._estimate()
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
        index = int(np.argmax(np.where(self._evictable, self._time, -1.0)))
        key = divmod(index, self._time.shape[1])
        return key if self._evictable[key] else None

    def next_prefetch(self, now: float) -> ExpertKey | None:
        targets = list(self._ahead)
        if not targets:
            return None
        worth_it = self._pace.least_probability(self._distance[self._layer, targets])
        fit = self._absent[targets] & (self._likely[targets] >= worth_it[:, None])
        row, expert = divmod(int(np.argmin(np.where(fit, self._time[targets], np.inf))), fit.shape[1])
        return (targets[row], expert) if fit[row, expert] else None

    def prefetch_slot(self, key: ExpertKey) -> int | None:
        if not self._free:
            victim = self.victim()
            if victim is None or self._time[victim] <= self._time[key]:
                return None
            self._evict(victim)
        self._absent[key] = False
        return self._free.pop()

    def used(self, key: ExpertKey) -> None:
        self._absent[key] = False

    def evicted(self, key: ExpertKey) -> None:
        self._evictable[key], self._absent[key] = False, True

    # -- estimates ------------------------------------------------------------------------------------------------

    def _learn(self, layer: int, chosen: np.ndarray, tokens: int) -> None:
        """Compare what was expected of this call with what came. A call for several tokens says nothing about it."""
        for horizon, probabilities in self._ahead.pop(layer, ()):
            if tokens == 1:
                self._calibration.learn(probabilities, horizon, chosen[: len(probabilities)])
        self._reuse.routed(layer, chosen, tokens)

    def _estimate(self) -> None:
        passes = self._reuse.passes.copy()
        for target in self._ahead:  # not used by the next call, it will be passed by as often as it would be else
            passes[target] *= (1 - self._likely[target]) / (1 - self._reuse.soon[target])
        self._time = self._distance[self._layer][:, None] + self.shape.layers * passes
