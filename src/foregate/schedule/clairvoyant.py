"""The bounds. Two know every choice to come, the others only those that the gates are asked for.

`clairvoyant` evicts the record whose next use is farthest (Belady) and fetches the next one that will be missed whenever the link has
room, unless that would evict a record needed before it ("aggressive" prefetch; Cao, Felten, Karlin and Li, 1995).
`clairvoyant-patient` waits for Belady's own victim ("conservative"): fewer loads, later. Where the link bounds that is
the better of the two; the bound of a case is what the better one reaches.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from foregate.schedule.base import Action, ExpertKey, Prediction, Scheduler, Shape
from foregate.schedule.lookahead import LookaheadScheduler

Route = tuple[int, Sequence[int]]  # (layer, its experts): one call of a layer
NEVER = 1 << 60
REACH = 2048  # calls of layers ahead that are searched for the next miss


class ClairvoyantScheduler(Scheduler):
    """future: every call of a layer, in order, from the first one on. Beyond its end nothing is known."""

    def __init__(self, slots: int, shape: Shape, future: Sequence[Route]) -> None:
        super().__init__(slots, shape)
        self._future = future
        self._uses: dict[ExpertKey, list[int]] = {}  # calls that use a record, last first
        for call in range(len(future) - 1, -1, -1):
            layer, experts = future[call]
            for expert in experts:
                self._uses.setdefault((layer, expert), []).append(call)
        self._call = -1  # the call at work
        self._searched = 0  # all that calls before it use has a slot

    def routed(self, layer: int, experts: Sequence[int], now: float = 0.0, tokens: int = 1) -> list[Action]:
        self._call += 1
        self._searched = max(self._searched, self._call + 1)
        for expert in experts:
            uses = self._uses.get((layer, expert), [])
            while uses and uses[-1] <= self._call:
                uses.pop()
        return super().routed(layer, experts, now, tokens)

    def victim(self) -> ExpertKey | None:
        return max(filter(self.evictable, self._slot_of), key=self._next_use, default=None)

    def evicted(self, key: ExpertKey) -> None:
        self._searched = min(self._searched, max(self._next_use(key), self._call + 1))

    def next_prefetch(self, now: float) -> ExpertKey | None:
        last = min(len(self._future), self._call + 1 + REACH)
        while self._searched < last:
            layer, experts = self._future[self._searched]
            for expert in experts:
                if (layer, expert) not in self._slot_of:
                    return layer, expert
            self._searched += 1
        return None

    def prefetch_slot(self, key: ExpertKey) -> int | None:
        if not self._free:
            victim = self._victim_for_prefetch()
            if victim is None or self._next_use(victim) <= self._searched:
                return None
            self._evict(victim)
        return self._free.pop()

    def _victim_for_prefetch(self) -> ExpertKey | None:
        return self.victim()

    def _next_use(self, key: ExpertKey, after: int = -1) -> int:
        """The first call after `after` that uses the record."""
        return next((use for use in reversed(self._uses.get(key, ())) if use > after), NEVER)


class PatientClairvoyantScheduler(ClairvoyantScheduler):
    """`clairvoyant-patient`: evicts for a prefetch what Belady would evict when the record is used."""

    def _victim_for_prefetch(self) -> ExpertKey | None:
        farthest = max(self._slot_of, key=lambda key: self._next_use(key, self._searched))
        return farthest if self.evictable(farthest) else None  # still in use before: it goes a moment later


class ClairvoyantHorizonScheduler(LookaheadScheduler):
    """`lookahead` with the truth in the place of the gates: exact for the calls they predict, nothing beyond.

    What they say of reuse stays as it is: it is about the time beyond.
    """

    def __init__(self, slots: int, shape: Shape, future: Sequence[Route]) -> None:
        super().__init__(slots, shape)
        self._future, self._call = future, -1

    def routed(self, layer: int, experts: Sequence[int], now: float = 0.0, tokens: int = 1) -> list[Action]:
        self._call += 1
        return super().routed(layer, experts, now, tokens)

    def predicted(self, prediction: Prediction, now: float = 0.0) -> list[Action]:
        ahead = tuple(
            (target, self._truth(target, given) if self._is_known(prediction, target) else given)
            for target, given in prediction.ahead
        )
        return super().predicted(replace(prediction, ahead=ahead, guess=None), now)

    def _is_known(self, prediction: Prediction, target: int) -> bool:
        """Whether the bound knows of the next call of `target` what this prediction is about."""
        return True

    def _truth(self, target: int, probabilities: np.ndarray) -> np.ndarray:
        call = self._call + self.distance(target)
        if call >= len(self._future):
            return probabilities
        truth = np.zeros(len(probabilities))
        truth[list(self._future[call][1])] = 1.0
        return truth


class ClairvoyantDeterminedScheduler(ClairvoyantHorizonScheduler):
    """`clairvoyant-determined`: the same, as far as it is determined when the gates are asked.

    Of the next token's first layers that is nothing before the token is sampled: there the gates' own probabilities stay.
    """

    def _is_known(self, prediction: Prediction, target: int) -> bool:
        return prediction.token or target > prediction.layer
