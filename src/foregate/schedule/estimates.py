"""What the lookahead policy learns while it runs: when experts come back, whom to believe, and what time costs."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from foregate.schedule.base import Shape

LATER = np.array([2.0, 8.5, 48.0])  # tokens after the next, of a use that falls after each of the heads' windows
HALF_LIVES = (32.0, 4.0)  # tokens, of the decayed frequencies
LONGEST = 4096.0  # tokens that a record is expected to stay at most
NEVER_ZERO = 1e-30  # a frequency that fades away would become a number that processors are slow with
LEAST = 0.001  # that a use does not come is never less probable
PRIOR = 4.0  # squared probability: how much predictions as given are worth against what was observed
JUDGED = 11  # one call in so many is compared with what was said of it; coprime to most numbers of layers
FADE = 0.998  # of what was observed, a layer call
EVICTED = 0.13  # of a load: what a wrong prefetch costs by what it evicted,
DELAYED = 0.37  # and by delaying others, where so many of them stand in line:
LINE = 4
GIVE_UP = 0.3  # of the probability that starts a prefetch: with less it is given up
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
    """Seconds of a load and of a layer's call without its waiting, and how much of the time the link works."""

    def __init__(self) -> None:
        self._load, self._layer = Average(), Average()
        self._last_call, self._waited, self._worked = None, 0.0, 0.0
        self._time = self._work = 0.0  # sums that fade, of calls with their waiting and of the link's work

    @property
    def load_seconds(self) -> float:
        return self._load.value

    @property
    def layer_seconds(self) -> float:
        return self._layer.value

    @property
    def occupancy(self) -> float:
        """The share of the time, 0 to 1, that the link works."""
        return min(self._work / self._time, 1.0) if self._time else 0.0

    def load(self, seconds: float) -> None:
        self._load.add(seconds)
        self._worked += seconds

    def layer_call(self, now: float) -> None:
        if self._last_call is not None:
            self._layer.add(max(now - self._last_call - self._waited, 0.0))
            self._time = self._time * FADE + now - self._last_call
            self._work = self._work * FADE + self._worked
        self._last_call, self._waited, self._worked = now, 0.0, 0.0

    def waited(self, seconds: float) -> None:
        self._waited += seconds

    def least_probability(self, distance: np.ndarray) -> np.ndarray:
        """From which probability on a prefetch for a layer so many calls ahead is expected to save time; float [n] both.

        Right, it hides what the link does until then, at most a load; wrong, it costs what it evicted and delays what
        stands behind it, until the link would have been idle: p * hidden = (1 - p) * lost.
        """
        load = self.load_seconds
        if not load:
            return np.full(distance.shape, UNKNOWN)
        lost = (EVICTED + DELAYED * self.occupancy**LINE) * load
        return lost / (np.minimum(distance * self.layer_seconds, load) + lost)


class Discount:
    """What a use counts the later it comes: exp(-calls / residence).

    `residence` is how long a record stays in its slot: slots over loads a call (Little's law). A use that is farther away
    than that would find its record gone anyway.
    """

    def __init__(self, slots: int, shape: Shape) -> None:
        self._slots, self._layers, self._width = slots, shape.layers, max(shape.experts)
        self._loads, self._loads_of_call = Average(FADE), 0
        self._calls = np.arange(2 * self._layers) % self._layers + 1.0
        self.renew()

    def load(self) -> None:
        self._loads_of_call += 1

    def call(self) -> None:
        self._loads.add(self._loads_of_call)
        self._loads_of_call = 0

    def renew(self) -> None:
        """Bring the factors up to date; once a token is enough."""
        residence = self._slots / max(self._loads.value, self._slots / (LONGEST * self._layers))
        self._by_calls = np.repeat(np.exp(-self._calls / residence)[:, None], self._width, axis=1)
        self.token = float(np.exp(-self._layers / residence))  # of a use one token later
        later = self.token**LATER
        self.after_windows = np.append(1.0, later[:-1]) - later  # for the reuse heads, see `ReuseEstimate`

    def after(self, layer: int) -> np.ndarray:
        """Factors [layers, experts] of each layer's next call, seen from the call of `layer`."""
        first = self._layers - 1 - layer
        return self._by_calls[first : first + self._layers]


class Calibration:
    """How far to go from what would be expected anyway to what a prediction says, by kind of prediction.

    A share between none, for useless predictions, and more than all, for timid ones: least squares over what was judged. A
    *kind* is a number: a horizon, or a source.
    """

    def __init__(self, kinds: int) -> None:
        self.share = np.ones(kinds)
        self.explained = [0.0] * kinds  # share of the squared error of what was expected anyway
        self._sums = [(PRIOR, PRIOR, PRIOR)] * kinds  # moved squared, moved times error, error squared

    def learn(self, said: Sequence[tuple[int, np.ndarray]], expected: np.ndarray, chosen: Sequence[int]) -> None:
        """Judge what was `said` of a call that used `chosen`: kinds and probabilities [experts]; `expected`: without them."""
        error, fade = -expected, FADE**JUDGED
        error[chosen] += 1.0
        unforeseen = float(error.dot(error))
        for kind, given in said:
            moved = given - expected
            squares, shared, errors = self._sums[kind]
            squares = squares * fade + float(moved.dot(moved))
            shared = shared * fade + float(moved.dot(error))
            errors = errors * fade + unforeseen
            self._sums[kind] = squares, shared, errors
            self.share[kind] = share = max(shared / squares, 0.0)
            self.explained[kind] = share * shared / errors


class ReuseEstimate:
    """When experts come back, gates of earlier layers aside; float [layers, experts] both.

    `skip`: the probability that the layer's next call does not use the expert. `lost`: what it is not worth then, 1 less
    the discounted use that comes later. Of two uses that may come the first counts: worth = 1 - skip * lost, times the
    discount of the layer's next call. By a decayed frequency, or by the reuse heads where they speak and have been the
    better judges of late.
    """

    def __init__(self, shape: Shape, discount: Discount) -> None:
        self._discount = discount
        self._frequencies = [Frequency(shape, half_life) for half_life in HALF_LIVES]
        self._heads: dict[int, np.ndarray] = {}  # layer -> what its reuse head said of the next call
        self._errors = [Average(FADE**JUDGED) for _ in HALF_LIVES]
        self._head_error = Average(FADE**JUDGED)
        self._frequency, self._believes_heads = self._frequencies[0], True
        self.skip = np.ones((shape.layers, max(shape.experts)))
        self.lost = np.ones(self.skip.shape)
        self._skip_rows, self._lost_rows = (
            [row[:experts] for row, experts in zip(rows, shape.experts, strict=True)] for rows in (self.skip, self.lost)
        )
        for layer in range(shape.layers):
            self._by_frequency(layer)

    @property
    def source(self) -> str:
        """Whose estimates are used while heads speak."""
        return "reuse heads" if self._believes_heads else self._frequency.name

    def routed(self, layer: int, experts: Sequence[int], judge: bool) -> None:
        """The layer's call used these experts. judge: compare it with what was expected of it."""
        head = self._heads.pop(layer, None)
        if judge:
            self._judge(layer, experts, head)
        for frequency in self._frequencies:
            frequency.add(layer, experts)
        if head is None or not self._believes_heads:  # otherwise the head will speak in a moment
            self._by_frequency(layer)

    def predicted(self, layer: int, reuse: np.ndarray) -> None:
        """reuse: float [windows, experts], the probabilities of a use within the next 1, 4 and 16 tokens."""
        self._heads[layer] = reuse[0]
        if self._believes_heads:
            skip, lost = expected_loss(reuse, self._discount.after_windows)
            self.skip[layer, : len(skip)], self.lost[layer, : len(skip)] = skip, lost

    def _judge(self, layer: int, experts: Sequence[int], head: np.ndarray | None) -> None:
        for frequency, error in zip(self._frequencies, self._errors, strict=True):
            error.add(_squared_error(frequency.of(layer), experts))
        values = [error.value for error in self._errors]
        self._frequency = self._frequencies[values.index(min(values))]
        if head is not None:
            self._head_error.add(_squared_error(head, experts))
            self._believes_heads = self._head_error.value <= min(values)

    def _by_frequency(self, layer: int) -> None:
        """With the same probability in every call the discounted uses are a geometric series."""
        skip, lost, later = self._skip_rows[layer], self._lost_rows[layer], self._discount.token
        np.subtract(1.0, self._frequency.of(layer), out=skip)
        np.multiply(skip, later, out=lost)
        np.subtract(1.0, lost, out=lost)
        np.divide(1.0 - later, lost, out=lost)


class Frequency:
    """Share of a layer's calls that use an expert, older calls counting less."""

    def __init__(self, shape: Shape, half_life: float) -> None:
        self.name = f"frequency with a half-life of {half_life:g} tokens"
        self._kept = 0.5 ** (1 / half_life)  # from token to token
        self._shares = np.zeros((shape.layers, max(shape.experts)))
        self._rows = [row[:experts] for row, experts in zip(self._shares, shape.experts, strict=True)]
        for row, k in zip(self._rows, shape.top_k, strict=True):
            row[:] = k / len(row)
        self._cells = [memoryview(row) for row in self._rows]  # the same, faster where few are touched

    def add(self, layer: int, experts: Sequence[int]) -> None:
        """The layer's call used these experts. A call of layer 0 starts a token."""
        if layer == 0:
            self._shares *= self._kept
            self._shares += NEVER_ZERO
        cells, one_use = self._cells[layer], 1 - self._kept
        for expert in experts:
            cells[expert] += one_use

    def of(self, layer: int) -> np.ndarray:
        """The shares, float [experts], to be read only."""
        return self._rows[layer]


def expected_loss(reuse: np.ndarray, after_windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(`skip`, `lost`) of `ReuseEstimate`, float [experts] each.

    reuse: [windows, experts]; after_windows: what is lost of a use's worth when it comes after each window and not in it.
    """
    left = np.maximum(1.0 - reuse, LEAST)
    return left[0], np.minimum(after_windows @ left / left[0], 1.0)


class Worth:
    """Whether gates are worth their time, judged every BLOCK tokens.

    What there is to save is estimated as what prefetches saved and a quarter of what was still waited for (eviction by the
    gates avoids about that share of misses). Less than the gates' own time: they rest, twice as long every time in a row.
    More, but not clearly: they rest for one block, and go on only if waiting without them was longer by more than they
    take. Such a trial holds for TRIAL tokens. A rest in which less was waited for than they would have taken, so that they
    could not have paid whatever they know, is followed by another one.
    """

    def __init__(self) -> None:
        self.listening = True
        self._spent = self._saved = self._waited = 0.0
        self._left, self._rest, self._untried = BLOCK, REST, 0  # tokens
        self._resting, self._per_token = 0, 0.0  # tokens of this rest; seconds that gates take
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
        elif self._trial is None and self._waited < self._per_token * self._resting:
            self._pause()
        else:
            self.listening, self._left = True, BLOCK
        self._trial = None if self.listening else self._trial
        self._spent = self._saved = self._waited = 0.0

    def facts(self) -> dict[str, Any]:
        return {"listening": self.listening, "tokens": self._tokens, "tokens_without_gates": self._rested}

    def _judge(self) -> None:
        gain = self._saved + self._waited / 4
        self._per_token = self._spent / BLOCK
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
        self._resting = self._rest
        self._rest = min(2 * self._rest, LONGEST_REST)


def _squared_error(probabilities: np.ndarray, experts: Sequence[int]) -> float:
    """Mean of (probability - whether the expert was used)², the part that all predictors share left out."""
    right = sum(probabilities[experts].tolist())
    return (float(probabilities.dot(probabilities)) - 2 * right) / len(probabilities)
