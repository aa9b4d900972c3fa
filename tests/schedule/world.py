"""A device that carries out a scheduler's actions in any order a real one might, and checks what it may rely on."""

from collections.abc import Callable, Iterable

import numpy as np

from foregate.schedule import Action, Cancel, Compute, ExpertKey, Hurry, Load, Prediction, Scheduler, Shape

EXPERTS, LAYERS, TOP_K = 6, 3, 2
SHAPE = Shape((EXPERTS,) * LAYERS, (TOP_K,) * LAYERS)
Choose = Callable[[int], int]  # a number below the one given


class World:
    """Slots with bytes in them, loads in flight, and the rules of the contract checked at every step."""

    load_seconds = 0.01  # of the link, for every record

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.slots: dict[int, ExpertKey] = {}  # what the bytes in each slot are
        self.in_flight: dict[ExpertKey, Load] = {}
        self.cancelled: set[ExpertKey] = set()
        self.waiting: set[ExpertKey] = set()  # routed and not computed
        self.loads: list[Load] = []
        self.on_host: list[ExpertKey] = []  # computed there
        self.now = 0.0

    def start(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Load():
                    assert action.slot not in {load.slot for load in self.in_flight.values()}, "two loads into one slot"
                    assert action.key not in self.in_flight, "a record is loaded twice at once"
                    self.slots.pop(action.slot, None)
                    self.in_flight[action.key] = action
                    self.loads.append(action)
                case Hurry():
                    assert action.key in self.in_flight
                    assert action.key in self.waiting
                case Cancel():
                    assert action.key in self.in_flight
                    assert not self.in_flight[action.key].demand, "a demand load is cancelled"
                    self.cancelled.add(action.key)
                case Compute():
                    assert not self.scheduler.is_resident(action.key), "the host computes what lies in a slot"
                    self.waiting.remove(action.key)  # served once, and not by a slot
                    self.on_host.append(action.key)
        if any(isinstance(action, Load) and not action.demand for action in actions):
            late = {key for key in self.waiting if key not in self.in_flight and key not in self.slots.values()}
            assert not late, "a prefetch starts while a demand load waits for a slot"
        self.scheduler.check_integrity()
        assert len(self.slots) + len(self.in_flight) <= self.scheduler.slots

    def finish(self, number: int, drop: bool = True) -> None:
        """One load ends; a cancelled one is dropped, or comes all the same."""
        key = list(self.in_flight)[number % len(self.in_flight)]
        load = self.in_flight.pop(key)
        self.now += 0.01
        if key in self.cancelled and drop:
            self.cancelled.remove(key)
            self.start(self.scheduler.dropped(key, self.now))
            return
        self.cancelled.discard(key)
        self.slots[load.slot] = key
        self.start(self.scheduler.arrived(key, self.load_seconds, self.now))

    def run_layer(
        self, layer: int, experts: Iterable[int], choose: Choose, prediction: Prediction | None = None
    ) -> None:
        """Serve one layer, computing and finishing loads in an arbitrary order; loads may stay in flight after it."""
        self.now += 0.01
        experts = sorted(experts)
        self.waiting = {(layer, expert) for expert in experts}
        self.start(self.scheduler.routed(layer, experts, self.now, 1 + choose(2)))
        if prediction is not None and self.scheduler.wants_predictions():
            self.start(self.scheduler.predicted(prediction, self.now))
        while self.waiting:
            ready = sorted(key for key in self.waiting if self.scheduler.is_resident(key))
            assert ready or self.in_flight, "deadlock: nothing resident and nothing on its way"
            pick = choose(len(ready) + len(self.in_flight))
            if pick < len(ready):
                key = ready[pick]
                assert self.slots[self.scheduler.slot(key)] == key, "the slot holds another record"
                self.waiting.remove(key)
                self.start(self.scheduler.computed([key], self.now))
            else:
                self.scheduler.waited(0.01)
                self.finish(pick - len(ready), drop=choose(2) == 0)

    def finish_all(self) -> None:
        while self.in_flight:
            self.finish(0)


def random_prediction(layer: int, choose: Choose, horizon: int = 2) -> Prediction:
    """Something that might be said after `layer`: any probabilities, certain ones among them."""
    levels = np.array([0.0, 0.1, 0.5, 0.9, 1.0])

    def some(*shape: int) -> np.ndarray:
        return levels[[choose(len(levels)) for _ in range(int(np.prod(shape)))]].reshape(shape)

    ahead = tuple(((layer + step) % LAYERS, some(EXPERTS)) for step in range(1, horizon + 1))
    return Prediction(layer, ahead, some(3, EXPERTS) if choose(2) else None, guess=some(EXPERTS) if choose(2) else None)
