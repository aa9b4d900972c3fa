"""What the lookahead policy learns while it runs: when experts come back, whom to believe, and what time costs."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from foregate.schedule.base import Shape

WINDOWS = (1, 4, 16)  # tokens ahead, of the reuse heads
TRAPEZOIDS = np.array([2.5, 7.5, 6.0])  # weights of what is left after each window in a sum over 16 tokens
HALF_LIFE = 32.0  # tokens, of the decayed frequency
LONGEST = 4096.0  # tokens: every expert is expected to return within
LEAST = 0.001  # that a use does not come is never less probable
BINS = 8  # of probability
PRIOR = 32.0  # predictions: how much a probability as given is worth against what was observed
JUDGED = 4  # one layer in so many tells who is the better judge of reuse
FREQUENCY, REUSE_HEADS = "decayed frequency", "reuse heads"
FADE = 0.998  # of what was observed, a layer call
LOSS = 0.5  # of a load: what a wrong prefetch costs by what it evicted
UNKNOWN = 0.5  # least probability of a prefetch before any load was timed
BLOCK, REST, LONGEST_REST = 8, 16, 256  # tokens between decisions to listen, and of silence after one not to
CLEARLY, TRIAL = 5.0, 256  # times the gates' time that needs no trial, and tokens that one holds for


class Average:
    """A fading mean."""

    def __init__(self, fade: float = 0.98) -> None:
        self._fade, self._sum, self._weight = fade, 0.0, 0.0

    def add(self, value: float) -> None:
        self._sum = self._sum * self._fade + value
        self._weight = self._weight * self._fade + 1.0

    @property
    def value(self) -> float:
        return self._sum / self._weight if self._weight else 0.0


class Pace:
    """Seconds of a load and of a layer's call without its waiting."""

    def __init__(self) -> None:
        self._load, self._layer = Average(), Average()
        self._last_call, self._waited = None, 0.0

    @property
    def load_seconds(self) -> float:
        return self._load.value

    @property
    def layer_seconds(self) -> float:
        return self._layer.value

    def load(self, seconds: float) -> None:
        self._load.add(seconds)

    def layer_call(self, now: float) -> None:
        if self._last_call is not None:
            self._layer.add(max(now - self._last_call - self._waited, 0.0))
        self._last_call, self._waited = now, 0.0

    def waited(self, seconds: float) -> None:
        self._waited += seconds

    def least_probability(self, distance: float) -> float:
        """From which probability on a prefetch for a layer so many calls ahead is expected to save time.

        Right, it hides what the link does until then, at most a load; wrong, it loses LOSS of one: p * hidden =
        (1 - p) * lost.
        """
        load = self.load_seconds
        if not load:
            return UNKNOWN
        lost = LOSS * load
        return lost / (min(distance * self.layer_seconds, load) + lost)


class Calibration:
    """Turns probabilities as given into what was observed, by horizon: useless predictions become the base rate.

    A *cell* is a horizon and a range of probability.
    """

    def __init__(self, horizons: int) -> None:
        self._counts = np.zeros((2, horizons * BINS))
        self._given, self._came = self._counts  # predictions by cell, and those that came true

    @staticmethod
    def first_cells(horizons: np.ndarray) -> np.ndarray:
        """The first cell of each horizon."""
        return horizons * BINS

    def correct(self, given: np.ndarray, first_cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(probabilities as they have turned out so far, their cells), each of the shape of `given`."""
        cells = (given * (BINS - 1e-4)).astype(np.intp)
        cells += first_cells
        return (self._came[cells] + PRIOR * given) / (self._given[cells] + PRIOR), cells

    def learn(self, cells: Sequence[np.ndarray], chosen: np.ndarray) -> None:
        """cells: [experts] of each prediction for one call; chosen: int, the experts it came true for."""
        self._counts *= FADE
        self._given += np.bincount(np.concatenate(cells), minlength=len(self._given))
        self._came += np.bincount(np.concatenate([part[chosen] for part in cells]), minlength=len(self._came))


class ReuseEstimate:
    """For every expert, gates of earlier layers aside: `passes`, the expected number of calls of its layer that pass it by
    before one uses it, and `rest`, the probability that the next one does not; float [layers, experts] both.

    By decayed frequency, or by the reuse heads where they speak and have been the better judges of late.
    """

    def __init__(self, shape: Shape) -> None:
        self._rate = [np.full(n, k / n) for n, k in zip(shape.experts, shape.top_k, strict=True)]
        self._decay = 0.5 ** (1 / HALF_LIFE)
        self._heads: dict[int, np.ndarray] = {}  # layer -> what its reuse head said of the next call
        self._head_error, self._rate_error = Average(FADE), Average(FADE)
        self.source = REUSE_HEADS  # whose estimates are used while heads speak
        self.passes = np.full((shape.layers, max(shape.experts)), LONGEST)
        self.rest = np.ones(self.passes.shape)
        for layer, rate in enumerate(self._rate):
            self.rest[layer, : len(rate)] = np.maximum(1 - rate, LEAST)
            self.passes[layer, : len(rate)] = 1 / rate - 1

    def routed(self, layer: int, experts: np.ndarray, tokens: int) -> None:
        """experts: int, those that the layer's call used."""
        rate, head = self._rate[layer], self._heads.pop(layer, None)
        if head is not None and tokens == 1 and layer % JUDGED == 0:
            self._head_error.add(_squared_error(head, experts))
            self._rate_error.add(_squared_error(rate, experts))
            self.source = REUSE_HEADS if self._head_error.value <= self._rate_error.value else FREQUENCY
        rate *= self._decay
        rate[experts] += 1 - self._decay
        if head is None or self.source is FREQUENCY:  # otherwise the head will speak in a moment
            self.rest[layer, : len(rate)] = np.maximum(1 - rate, LEAST)
            self.passes[layer, : len(rate)] = 1 / np.maximum(rate, 1 / LONGEST) - 1

    def predicted(self, layer: int, reuse: np.ndarray) -> None:
        """reuse: float [windows, experts], the probabilities of a use within WINDOWS tokens."""
        rest, passes = tokens_passing(reuse)
        self._heads[layer] = reuse[0]
        if self.source is REUSE_HEADS:
            self.rest[layer, : len(rest)], self.passes[layer, : len(rest)] = rest, passes


def tokens_passing(reuse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(probability that the next token does not use it, expected tokens that pass before one does), float [experts] each.

    reuse: [windows, experts]. The sum over t >= 1 of the chance that no token up to t has come: linear between the
    windows, then falling as it did in the last.
    """
    left = np.maximum(1.0 - reuse, LEAST)
    np.minimum(left[1], left[0], out=left[1])
    np.minimum(left[2], left[1], out=left[2])
    fall = np.minimum((left[2] / left[1]) ** (1 / (WINDOWS[2] - WINDOWS[1])), 1 - 1 / LONGEST)
    return left[0], TRAPEZOIDS @ left + left[2] / (1 - fall)


class Worth:
    """Whether gates are worth their time, judged every BLOCK tokens.

    What there is to save is estimated as what prefetches saved and a quarter of what was still waited for (eviction by the
    gates avoids about that share of misses). Less than the gates' own time: they rest, twice as long every time in a row.
    More, but not clearly: they rest for one block, and go on only if waiting without them was longer by more than they
    take. Such a trial holds for TRIAL tokens.
    """

    def __init__(self) -> None:
        self.listening = True
        self._spent = self._saved = self._waited = 0.0
        self._left, self._rest, self._untried = BLOCK, REST, 0  # tokens
        self._trial: float | None = None  # seconds that a block with gates took for them and in waiting, to be compared
        self._tokens = self._rested = 0

    def spent(self, seconds: float) -> None:
        self._spent += seconds

    def saved(self, seconds: float) -> None:
        self._saved += seconds

    def waited(self, seconds: float) -> None:
        self._waited += seconds

    def next_token(self) -> None:
        self._tokens += 1
        self._rested += not self.listening
        self._left -= 1
        if self._left > 0:
            return
        if self.listening:
            self._judge()
        elif self._trial is not None and self._trial > self._waited:
            self._untried = 0
            self._pause()
        else:
            self.listening, self._left = True, BLOCK
        self._trial = None if self.listening else self._trial
        self._spent = self._saved = self._waited = 0.0

    def facts(self) -> dict[str, Any]:
        return {"listening": self.listening, "tokens": self._tokens, "tokens_without_gates": self._rested}

    def _judge(self) -> None:
        gain = self._saved + self._waited / 4
        self._untried -= BLOCK
        self._left = BLOCK
        if self._spent > gain:
            self._pause()
        elif self._spent * CLEARLY > gain and self._untried <= 0:
            self.listening, self._untried = False, TRIAL
            self._trial = self._spent + self._waited
        else:
            self._rest = REST

    def _pause(self) -> None:
        self.listening, self._left, self._trial = False, self._rest, None
        self._rest = min(2 * self._rest, LONGEST_REST)


def _squared_error(probabilities: np.ndarray, experts: np.ndarray) -> float:
    """Mean of (probability - whether the expert was used)², the part that all predictors share left out."""
    return float(probabilities @ probabilities - 2 * probabilities[experts].sum()) / len(probabilities)
