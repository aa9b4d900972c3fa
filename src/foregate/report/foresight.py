"""How right predictions were: each is kept until its layer is called, then compared with what the router chose.

Comparing takes a few array operations, so calls are put aside and compared many at a time. Only calls for one token
count, and predictions after such: what a prompt's tokens choose together is nearly every expert, however it is foreseen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from foregate.schedule import Prediction

TOGETHER = 32  # comparisons of one aim that are made at once
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

    def plus(self, other: "Score") -> "Score":
        """Both together."""
        return Score(
            self.calls + other.calls,
            self.chosen + other.chosen,
            self.found + other.found,
            self.sure + other.sure,
            self.right + other.right,
        )

    @property
    def recall(self) -> float | None:
        """recall@k, or None where nothing was predicted."""
        return self.found / self.chosen if self.chosen else None

    @property
    def precision(self) -> float | None:
        """Of the experts given at least SURE, those that were chosen; None where there was none."""
        return self.right / self.sure if self.sure else None


@dataclass
class _Account:
    """What is known of one aim's predictions."""

    expected: Any = None  # float [experts]: what was predicted of the next call
    waiting: list[tuple[Any, Sequence[int]]] = field(default_factory=list)  # (predicted, chosen), not compared yet
    score: Score = field(default_factory=Score)

    def compare(self) -> None:
        if self.waiting:
            given, chosen = zip(*self.waiting, strict=True)
            self.score = self.score.plus(compare(np.stack(given), chosen))
            self.waiting.clear()


class Foresight:
    """Scores of all predictions by aim. `routed` and `predicted` belong to one thread, `scores` may be asked by any."""

    def __init__(self, layers: int) -> None:
        self._tokens = 0  # of the last call
        self._accounts: dict[Aim, _Account] = {}
        self._of_source: dict[tuple[str, int], list[_Account]] = {}  # in the order of the source's predictions
        self._of_target: list[list[_Account]] = [[] for _ in range(layers)]
        self._lock = Lock()  # guards the accounts

    def predicted(self, prediction: Prediction) -> None:
        """The scheduler was told this, after the call of `prediction.layer` or before layer 0."""
        if not prediction.token and self._tokens != 1:
            return
        source = TOKEN if prediction.token else LAYER
        accounts = self._of_source.get((source, prediction.layer))
        if accounts is None or len(accounts) != len(prediction.ahead):
            accounts = self._open(source, prediction)
        for account, (_, given) in zip(accounts, prediction.ahead, strict=True):
            account.expected = given

    def routed(self, layer: int, experts: Sequence[int], tokens: int) -> None:
        """The router of `layer` chose `experts`, distinct, for so many tokens."""
        self._tokens = tokens
        accounts = self._of_target[layer]
        if not accounts:
            return
        with self._lock:
            for account in accounts:
                given, account.expected = account.expected, None
                if given is None or tokens != 1 or not experts:
                    continue
                account.waiting.append((given, experts))
                if len(account.waiting) >= TOGETHER:
                    account.compare()

    def scores(self) -> dict[Aim, Score]:
        """All that was compared until now, sorted by aim."""
        with self._lock:
            for account in self._accounts.values():
                account.compare()
            return {aim: self._accounts[aim].score for aim in sorted(self._accounts) if self._accounts[aim].score.calls}

    def _open(self, source: str, prediction: Prediction) -> list[_Account]:
        """The accounts of what this source predicts; made when it speaks for the first time."""
        layers, before = len(self._of_target), -1 if source == TOKEN else prediction.layer
        aims = [Aim(target, source, (target - before - 1) % layers + 1) for target, _ in prediction.ahead]
        with self._lock:
            for aim in aims:
                if aim not in self._accounts:
                    self._accounts[aim] = _Account()
                    self._of_target[aim.layer].append(self._accounts[aim])
            accounts = self._of_source[source, prediction.layer] = [self._accounts[aim] for aim in aims]
        return accounts


def compare(given: np.ndarray, chosen: Sequence[Sequence[int]]) -> Score:
    """The score of predictions, float [calls, experts], for calls that chose these experts, distinct in each.

    An expert as likely as the k-th counts as one of the k likeliest.
    """
    calls = np.arange(len(given))
    counts = np.array([len(own) for own in chosen])
    rows, columns = np.repeat(calls, counts), np.concatenate(chosen)
    own, sure = given[rows, columns], given >= SURE
    least = np.sort(given, axis=1)[calls, given.shape[1] - counts]  # of the k likeliest
    return Score(
        calls=len(given),
        chosen=len(rows),
        found=int(np.count_nonzero(own >= least[rows])),
        sure=int(np.count_nonzero(sure)),
        right=int(np.count_nonzero(own >= SURE)),
    )


def by_horizon(scores: dict[Aim, Score]) -> dict[tuple[str, int], Score]:
    """(source, horizon) -> all layers' scores together."""
    together: dict[tuple[str, int], Score] = {}
    for aim, score in scores.items():
        kind = aim.source, aim.horizon
        together[kind] = together.get(kind, Score()).plus(score)
    return dict(sorted(together.items()))
