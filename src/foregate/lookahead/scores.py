"""The figures of one method over some rows, and the counts they are made of, which add up over rows and targets."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch

from foregate.config import EvaluateGatesConfig
from foregate.lookahead.metrics import (
    Ranking,
    Ratio,
    calibration_bins,
    covered_at,
    expected_calibration_error,
    precision_at,
)

OVER_FETCH = (0, 1, 2)  # experts fetched beyond k
FREQUENCY, PREVIOUS, NEXT_ROUTER, UNTRAINED, GATE, CEILING = METHODS = (
    "frequency",
    "previous_token",
    "next_router",
    "untrained_gate",
    "gate",
    "ceiling",
)


@dataclass(frozen=True)
class Confidence:
    """The experts that were given at least the probability `threshold`."""

    threshold: float
    precision: float | None  # the share of them that was used; None if there were none
    covered: float | None  # the share they make up of all experts used


@dataclass(frozen=True)
class Bin:
    """Predictions of about the same probability."""

    predictions: int
    expected: float  # their mean probability
    observed: float  # the share that came true


@dataclass(frozen=True)
class Score:
    """What a method reached. Shares from 0 to 1; None where there was nothing to count."""

    tokens: int
    recall: tuple[float | None, ...]  # of the k, k+1 and k+2 best
    exact_sets: float | None
    auc: float | None
    confidence: tuple[Confidence, ...] = ()  # this and the rest: only of methods that give probabilities
    calibration_error: float | None = None
    calibration: tuple[Bin, ...] = ()


class Tally:
    """Counts of one method; those of different rows add up."""

    def __init__(self) -> None:
        self.tokens = 0
        self.recall = [Ratio(0, 0) for _ in OVER_FETCH]
        self.exact_sets = self.auc = Ratio(0, 0)
        self.sure = [(Ratio(0, 0), Ratio(0, 0)) for _ in EvaluateGatesConfig.thresholds]
        self.bins: torch.Tensor | None = None  # None: the method gives no probabilities

    def add(self, logits: torch.Tensor, chosen: torch.Tensor, probabilities: torch.Tensor | None) -> None:
        """logits and probabilities [rows, num_experts], chosen int64 [rows, k]."""
        ranking, k = Ranking(logits, chosen), chosen.shape[1]
        self.tokens += len(chosen)
        self.recall = [old.plus(ranking.recall(k + more)) for old, more in zip(self.recall, OVER_FETCH, strict=True)]
        self.exact_sets = self.exact_sets.plus(ranking.exact_sets())
        self.auc = self.auc.plus(ranking.auc())
        if probabilities is None:
            return
        self.sure = [
            (
                precision.plus(precision_at(probabilities, chosen, threshold)),
                covered.plus(covered_at(probabilities, chosen, threshold)),
            )
            for threshold, (precision, covered) in zip(EvaluateGatesConfig.thresholds, self.sure, strict=True)
        ]
        bins = calibration_bins(probabilities, chosen, EvaluateGatesConfig.bins)
        self.bins = bins if self.bins is None else self.bins + bins

    def plus(self, other: "Tally") -> "Tally":
        """The counts over the rows of both."""
        both = Tally()
        both.tokens = self.tokens + other.tokens
        both.recall = [a.plus(b) for a, b in zip(self.recall, other.recall, strict=True)]
        both.exact_sets, both.auc = self.exact_sets.plus(other.exact_sets), self.auc.plus(other.auc)
        both.sure = [(a.plus(c), b.plus(d)) for (a, b), (c, d) in zip(self.sure, other.sure, strict=True)]
        both.bins = self.bins if other.bins is None else other.bins if self.bins is None else self.bins + other.bins
        return both

    def score(self, bins: bool) -> Score:
        """bins: keep the calibration by bins too."""
        ratios: dict[str, Any] = {
            "tokens": self.tokens,
            "recall": tuple(ratio.value for ratio in self.recall),
            "exact_sets": self.exact_sets.value,
            "auc": self.auc.value,
        }
        if self.bins is None:
            return Score(**ratios)
        confidence = tuple(
            Confidence(threshold, precision.value, covered.value)
            for threshold, (precision, covered) in zip(EvaluateGatesConfig.thresholds, self.sure, strict=True)
        )
        table = tuple(Bin(int(n), p / n, y / n) for n, p, y in self.bins.T.tolist() if n) if bins else ()
        return Score(
            **ratios, confidence=confidence, calibration_error=expected_calibration_error(self.bins), calibration=table
        )


Tallies = dict[str, Tally]  # by method


def merged(parts: Iterable[Tallies]) -> Tallies:
    """Sums by method; a method that is missing somewhere would be judged on other rows and is left out."""
    parts = list(parts)
    methods = [method for method in METHODS if parts and all(method in part for part in parts)]
    return {method: reduce(Tally.plus, [part[method] for part in parts]) for method in methods}


def scores_of(tallies: Tallies, bins: bool = False) -> dict[str, Score]:
    """The figures of every method."""
    return {method: tally.score(bins) for method, tally in tallies.items()}
