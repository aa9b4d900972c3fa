"""`lookahead`: one estimate for eviction and prefetch, what a record in a slot is worth, fed by the gates.

A record is worth the chance that it is used, a use counting the less the later it comes. The probability of a use in its
layer's next call comes from the gates where they have spoken, the rest from the reuse heads or from decayed frequency,
whichever has been right more often. The record that is worth least leaves first; of the absent ones that gates expect the
most urgent is fetched when the link has room, if that is expected to save time and nothing that is worth more has to go
for it. docs/scheduling.md derives the rules and justifies the constants.
"""

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from foregate.schedule.base import GATES, Action, ExpertKey, Prediction, Scheduler, Shape
from foregate.schedule.estimates import GIVE_UP, JUDGED, Calibration, Discount, Pace, ReuseEstimate, Worth
from foregate.schedule.urgency import Need, by_urgency

CANDIDATES = 16  # for a prefetch, after a prediction


class LookaheadScheduler(Scheduler):
    """See the module's description. Without predictions it evicts by decayed frequency and fetches nothing ahead."""

    told_by = GATES

    def __init__(self, slots: int, shape: Shape) -> None:
        super().__init__(slots, shape)
        layers, self._width = shape.layers, max(shape.experts)
        size = layers, self._width
        self._discount = Discount(slots, shape)
        self._reuse = ReuseEstimate(shape, self._discount)
        self._skip = self._reuse.skip.copy()  # the same with what gates say of the next call
        self._away = np.full(size, np.inf)  # 0 where a record is resident
        self._value = np.zeros(size)  # the discounted chance of a use
        self._leaving = np.zeros(size)  # the same for what may be evicted, infinity for what may not
        self._stale = True  # whether the latter two are out of date
        self._latest: tuple[_Aims, np.ndarray] | None = None  # the last prediction, as `skip`
        self._heard = 0  # the call after which it came
        self._candidates: list[ExpertKey] | None = []  # worth a prefetch, the most urgent last; None: to be found
        self._aims: dict[tuple[int, bool, bool], _Aims] = {}  # by the source of a prediction
        self._calibration = Calibration(_guess_kind(shape) + 1)
        # Layer whose next call is judged -> kind of a prediction, what it gave.
        self._said: dict[int, list[tuple[int, np.ndarray]]] = {}
        self._pace, self._worth = Pace(), Worth()
        self._distances = np.arange(layers + 1.0)
        self._least = np.zeros(layers + 1)  # probability of a prefetch, by distance
        self._layer, self._calls = layers - 1, -1  # that was routed last; its number

    # -- events ---------------------------------------------------------------------------------------------------

    def routed(self, layer: int, experts: Iterable[int], now: float = 0.0, tokens: int = 1) -> list[Action]:
        experts = list(experts)
        self._layer, self._stale = layer, True
        self._calls += 1
        self._pace.layer_call(now)
        self._discount.call()
        if layer == 0:
            self._next_token()
        self._learn(layer, experts, tokens)
        self._skip[layer] = self._reuse.skip[layer]
        if self._candidates:
            self._candidates = [key for key in self._candidates if key[0] != layer]
        actions = self._give_up_wrong(layer, experts) if self._loading else []
        return actions + super().routed(layer, experts, now, tokens)

    def predicted(self, prediction: Prediction, now: float = 0.0) -> list[Action]:
        self._worth.spent(prediction.seconds)
        self._stale = True
        if prediction.reuse is not None:
            self._reuse.predicted(prediction.layer, prediction.reuse)
            self._skip[prediction.layer] = self._reuse.skip[prediction.layer]
        actions = []
        if prediction.ahead:
            self._listen(prediction)
            self._candidates = None
            actions = self._give_up_unlikely() if self._loading else []
        return actions + self._go_on(now)

    def arrived(self, key: ExpertKey, seconds: float = 0.0, now: float = 0.0) -> list[Action]:
        self._pace.load(seconds)
        self._discount.load()
        self._away[key] = 0.0
        if key not in self._needed:
            self._leaving[key] = self._value[key]
        return super().arrived(key, seconds, now)

    def computed(self, keys: Collection[ExpertKey], now: float = 0.0) -> list[Action]:
        if not self._stale:
            for key in keys:
                self._leaving[key] = self._value[key]
        return super().computed(keys, now)

    def waited(self, seconds: float) -> None:
        self._pace.waited(seconds)
        self._worth.waited(seconds)

    def wants_predictions(self) -> bool:
        return self._worth.listening

    def wants_guess(self) -> bool:
        return (self._calls + 1) % JUDGED == 0 or self._guess_is_better()

    def expected(self) -> tuple[ExpertKey, ...]:
        if self._latest is None:
            return ()
        aims, skip = self._latest
        return tuple(aims.keys[place] for place in (skip <= 0.5).nonzero()[0].tolist())

    def facts(self) -> dict[str, Any]:
        return {
            **self._worth.facts(),
            "load_seconds": self._pace.load_seconds,
            "layer_seconds": self._pace.layer_seconds,
            "reuse_by": self._reuse.source,
        }

    # -- decisions ------------------------------------------------------------------------------------------------

    def victim(self) -> ExpertKey | None:
        if self._stale:
            self._refresh()
        place = int(self._leaving.argmin())
        return divmod(place, self._width) if self._leaving.item(place) < np.inf else None

    def may_prefetch(self) -> bool:
        """Beside the idle link: when there is news, and one prefetch under way that may be less urgent."""
        if not self._loading:
            return True
        return self._candidates is None and len(self._loading) == 1 == len(self._prefetching())

    def next_prefetch(self, now: float) -> ExpertKey | None:
        if self._candidates is None:
            self._candidates = self._worth_fetching()
        best = self._most_urgent() if self._candidates else None
        if not self._loading:
            return self.load_for_later() if best is None else best
        if best is not None:
            load = self._pace.load_seconds
            under_way = next(iter(self._loading))
            if self._need(best).goes_before(self._need(under_way, self.load_left(under_way, load, now))):
                return best
        return None

    def _most_urgent(self) -> ExpertKey | None:
        """The last candidate, when those that are worth less than what would have to go are struck off."""
        least = self._least_value()
        while self._candidates:
            key = self._candidates[-1]
            if key not in self._slot_of and self._value[key] > least:
                return key
            self._candidates.pop()
        return None

    def _least_value(self) -> float:
        """Of what would have to go for a record."""
        if self._free:
            return -np.inf
        victim = self.victim()
        return np.inf if victim is None else self._value[victim]

    def prefetch_slot(self, key: ExpertKey) -> int | None:
        if not self._free:
            victim = self.victim()
            if victim is None or self._value[victim] >= self._value[key]:
                return None
            self._evict(victim)
        return self._free.pop()

    def evicted(self, key: ExpertKey) -> None:
        self._away[key] = self._leaving[key] = np.inf

    def _count_use(self, key: ExpertKey, late: bool) -> None:
        super()._count_use(key, late)
        self._worth.saved(self._pace.load_seconds / (2 if late else 1))

    def worth_loading(self, keys: list[ExpertKey]) -> list[ExpertKey]:
        if self._stale:
            self._refresh()
        self._stale = True  # the layer's experts are only about to be needed
        return sorted(keys, key=self._value.__getitem__, reverse=True)

    def _worth_fetching(self) -> list[ExpertKey]:
        """What gates expect, is not resident and worth a load and a slot; what is most urgent comes last."""
        aims, skip = self._latest
        chance = 1.0 - skip
        probable = chance >= self._least.take(aims.distances)
        probable &= self._away.ravel()[aims.places] > 0.0
        if passed := self._calls - self._heard:
            probable &= aims.distances > passed
        places = probable.nonzero()[0]
        if len(places):
            least = self._least_value()  # brings values up to date
            places = places[self._value.ravel()[aims.places][places] > least]
        if len(places) > 1:
            due = (aims.distances[places] - passed - 0.5) * self._pace.layer_seconds
            places = places[by_urgency(chance[places], due, self._pace.load_seconds)]
        return [aims.keys[place] for place in places[-CANDIDATES:].tolist()]

    def _need(self, key: ExpertKey, left: float | None = None) -> Need:
        """left: seconds of the link's work, if some of it is done. The layer at work is taken to be half through."""
        due = (self.distance(key[0]) - 0.5) * self._pace.layer_seconds
        return Need(1.0 - self._skip[key], self._pace.load_seconds if left is None else left, due)

    def _give_up_wrong(self, layer: int, chosen: list[int]) -> list[Action]:
        """Cancel prefetches for this very call that it does not use."""
        return self.cancel([key for key in self._prefetching() if key[0] == layer and key[1] not in chosen])

    def _give_up_unlikely(self) -> list[Action]:
        """Cancel prefetches that the gates, just heard, have become doubtful of."""
        stale = []
        for key in self._prefetching():
            spoken_of = key[0] in self._latest[0].layers
            if spoken_of and 1.0 - self._skip[key] < GIVE_UP * self._least[self.distance(key[0])]:
                stale.append(key)
        return self.cancel(stale)

    def distance(self, layer: int) -> int:
        """Calls until the next one of `layer`, 1 to their number."""
        return (layer - self._layer - 1) % self.shape.layers + 1

    def _prefetching(self) -> list[ExpertKey]:
        return [key for key, demand in self._loading.items() if not demand and key not in self._dropping]

    # -- estimates ------------------------------------------------------------------------------------------------

    def _next_token(self) -> None:
        self._worth.next_token()
        self._discount.renew()
        self._least = self._pace.least_probability(self._distances)

    def _learn(self, layer: int, experts: list[int], tokens: int) -> None:
        """Compare what was expected of this call with what came. A call for several tokens says nothing about it."""
        said = self._said.pop(layer, None)
        if said and tokens == 1:
            expected = 1.0 - self._reuse.skip[layer, : self.shape.experts[layer]]
            self._calibration.learn(said, expected, experts)
        self._reuse.routed(layer, experts, judge=tokens == 1 and self._calls % JUDGED == 0)

    def _listen(self, prediction: Prediction) -> None:
        """Take in a prediction's probabilities, corrected; for the next layer the guess, if it has been the better one."""
        parts = [given for _, given in prediction.ahead]
        guess = prediction.guess if self.wants_guess() else None
        self._note_for_judging(prediction, guess)
        by_guess = guess is not None and self._guess_is_better()
        aims = self._aims_of(prediction, by_guess)
        anyway = self._reuse.skip.ravel()[aims.places]
        skip = np.concatenate([guess, *parts[1:]] if by_guess else parts, dtype=np.float64)
        skip += anyway
        skip -= 1.0
        skip *= self._calibration.share.take(aims.kinds)
        np.subtract(anyway, skip, out=skip)
        np.maximum(skip, 0.0, out=skip)  # timid gates may be taken for more than certain
        self._skip.ravel()[aims.places] = skip
        self._latest, self._heard = (aims, skip), self._calls

    def _note_for_judging(self, prediction: Prediction, guess: np.ndarray | None) -> None:
        """Keep what is said of those of the coming calls that are judged."""
        for place in range(JUDGED - 1 - self._calls % JUDGED, len(prediction.ahead), JUDGED):
            target, given = prediction.ahead[place]
            said = self._said.setdefault(target, [])
            said.append((_kind(prediction, place, self.shape), given))
            if guess is not None and place == 0:
                said.append((_guess_kind(self.shape), guess))

    def _guess_is_better(self) -> bool:
        return self._calibration.explained[_guess_kind(self.shape)] > self._calibration.explained[0]

    def _aims_of(self, prediction: Prediction, by_guess: bool) -> "_Aims":
        source = prediction.layer, prediction.token, by_guess
        if source not in self._aims:
            self._aims[source] = _Aims(prediction, self.shape, by_guess)
        return self._aims[source]

    def _refresh(self) -> None:
        value, leaving = self._value, self._leaving
        np.multiply(self._skip, self._reuse.lost, out=value)
        np.subtract(1.0, value, out=value)
        value *= self._discount.after(self._layer)
        np.add(value, self._away, out=leaving)
        for key in self._needed:
            leaving[key] = np.inf
        self._stale = False


def _kind(prediction: Prediction, place: int, shape: Shape) -> int:
    """What a prediction's target is to the calibration: a horizon, within the token, over its end, or from its embedding."""
    first = 2 if prediction.token else int(prediction.ahead[place][0] <= prediction.layer)
    return first * shape.layers + place


def _guess_kind(shape: Shape) -> int:
    """The kind that follows all others."""
    return 3 * shape.layers


class _Aims:
    """Where the values of a prediction belong that lie side by side, target after target."""

    def __init__(self, prediction: Prediction, shape: Shape, by_guess: bool) -> None:
        layers, width = shape.layers, max(shape.experts)
        targets = [target for target, _ in prediction.ahead]
        sizes = [shape.experts[target] for target in targets]
        kinds = [_kind(prediction, place, shape) for place in range(len(targets))]
        if by_guess:
            kinds[0] = _guess_kind(shape)
        self.layers = frozenset(targets)
        self.kinds = np.repeat(kinds, sizes)
        self.distances = np.repeat([(target - prediction.layer - 1) % layers + 1 for target in targets], sizes)
        self.keys = [(target, expert) for target, size in zip(targets, sizes, strict=True) for expert in range(size)]
        places = np.array([target * width + expert for target, expert in self.keys])  # in [layers, experts]
        in_a_row = bool((np.diff(places) == 1).all())
        self.places = slice(int(places[0]), int(places[-1]) + 1) if in_a_row else places  # slices need no copies
