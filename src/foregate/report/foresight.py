"""How right predictions were: each is kept until its layer is called, then compared with what the router chose.

Comparing takes a few array operations, so calls are put aside and compared many at a time. Only calls for one token
count, and predictions after such: what a prompt's tokens choose together is nearly every expert, however it is foreseen.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from foregate.schedule import Prediction

TOGETHER = 64  # comparisons of one layer that are made at once
LAYER, TOKEN = "layer", "token"
SURE = 0.5  # the probability from which an expert counts as foreseen, for the precision


class Aim(NamedTuple):
    """Which predictions are counted together."""

    layer: int  # that is predicted
    source: str  # LAYER: a layer's router input was read; TOKEN: the sampled token's embedding
    horizon: int  # layers ahead, 1 is the next one; the embedding stands before layer 0


@dataclass
class Score:
    """Predictions of one kind against what the routers chose, in experts."""

    calls: int = 0
    chosen: int = 0
    found: int = 0  # chosen, and among the k likeliest, where the call chose k
    sure: int = 0  # given a probability of at least SURE
    right: int = 0  # and chosen

    @property
    def recall(self) -> float | None:
        """recall@k, or None where nothing was predicted."""
        return self.found / self.chosen if self.chosen else None

    @property
    def precision(self) -> float | None:
        """Of the experts given at least SURE, those that were chosen; None where there was none."""
        return self.right / self.sure if self.sure else None


class Foresight:
    """Scores of all predictions by aim. `routed` and `predicted` belong to one thread, `scores` may be asked by any."""

    def __init__(self, layers: int) -> None:
        self._layers, self._tokens = layers, 0  # of the last call
        self._expected: dict[int, list[tuple[Aim, Any]]] = {}  # layer -> predictions of its next call
        self._compared: dict[Aim, np.ndarray] = {}  # counts in the order of Score's fields
        self._waiting: dict[int, list[tuple[Aim, Any, Sequence[int]]]] = {}
        self._lock = Lock()  # guards the latter two

    def predicted(self, prediction: Prediction) -> None:
        """The scheduler was told this, after the call of `prediction.layer` or before layer 0."""
        if not prediction.token and self._tokens != 1:
            return
        source, before = (TOKEN, -1) if prediction.token else (LAYER, prediction.layer)
        for target, given in prediction.ahead:
            horizon = (target - before - 1) % self._layers + 1
            self._expected.setdefault(target, []).append((Aim(target, source, horizon), given))

    def routed(self, layer: int, experts: Sequence[int], tokens: int) -> None:
        """The router of `layer` chose `experts`, distinct, for so many tokens."""
        self._tokens = tokens
        expected = self._expected.pop(layer, None)
        if expected is None or tokens != 1 or not experts:
            return
        with self._lock:
            waiting = self._waiting.setdefault(layer, [])
            waiting += [(aim, given, experts) for aim, given in expected]
            if len(waiting) >= TOGETHER:
                self._compare(layer)

    def scores(self) -> dict[Aim, Score]:
        """All that was compared until now, sorted by aim."""
        with self._lock:
            for layer in self._waiting:
                self._compare(layer)
            return {aim: Score(*self._compared[aim].tolist()) for aim in sorted(self._compared)}

    def _compare(self, layer: int) -> None:
        waiting, self._waiting[layer] = self._waiting[layer], []
        if not waiting:
            return
        given = np.stack([given for _, given, _ in waiting])
        counts = compare(given, [experts for _, _, experts in waiting])
        for (aim, _, _), row in zip(waiting, counts, strict=True):
            if aim in self._compared:
                self._compared[aim] += row
            else:
                self._compared[aim] = row.copy()


def compare(given: np.ndarray, chosen: Sequence[Sequence[int]]) -> np.ndarray:
    """int [calls, 5], the fields of Score. given: float [calls, experts]; chosen: the experts of each call, distinct.

    Of equal probabilities the expert of the lower index counts as the likelier one.
    """
    rows = np.repeat(np.arange(len(given)), [len(experts) for experts in chosen])
    mask = np.zeros(given.shape, bool)
    mask[rows, np.concatenate(chosen)] = True
    wanted = mask.sum(1)
    order = np.argsort(-given, axis=1, kind="stable")
    likeliest = np.arange(given.shape[1]) < wanted[:, None]
    found = (np.take_along_axis(mask, order, axis=1) & likeliest).sum(1)
    sure = given >= SURE
    return np.stack([np.ones_like(wanted), wanted, found, sure.sum(1), (sure & mask).sum(1)], axis=1)


def by_horizon(scores: dict[Aim, Score]) -> dict[tuple[str, int], Score]:
    """(source, horizon) -> all layers' scores together."""
    together: dict[tuple[str, int], np.ndarray] = {}
    for aim, score in scores.items():
        kind = aim.source, aim.horizon
        together[kind] = together.get(kind, 0) + np.array(astuple(score))
    return {kind: Score(*together[kind].tolist()) for kind in sorted(together)}
