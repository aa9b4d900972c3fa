"""What the link brings first: the order in which compute is expected to wait less."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from world import EXPERTS, LAYERS, SHAPE, World

from foregate.schedule import Costs, ExpertKey, Placement, Prediction, make_scheduler
from foregate.schedule.urgency import Need, by_urgency

SECONDS = st.floats(0, 100)
NEEDS = st.builds(Need, st.floats(0, 1), SECONDS, SECONDS)


def expected_wait(queue: list[Need]) -> float:
    """The obvious way: each record is there when all before it and itself are through."""
    through, wait = 0.0, 0.0
    for need in queue:
        through += need.left
        wait += need.chance * max(through - need.due, 0.0)
    return wait


@given(NEEDS, NEEDS)
def test_of_two_the_order_with_the_shorter_expected_wait_is_taken(one: Need, other: Need) -> None:
    kept, swapped = expected_wait([one, other]), expected_wait([other, one])
    assume(abs(kept - swapped) > 1e-6)
    assert one.goes_before(other) == (kept < swapped)
    assert other.goes_before(one) == (swapped < kept)


def test_what_can_wait_stands_behind_what_cannot() -> None:
    near, far = Need(chance=0.5, left=2.0, due=1.0), Need(chance=1.0, left=2.0, due=5.0)
    assert near.goes_before(far)
    assert Need(chance=1.0, left=2.0, due=2.5).goes_before(near)


@given(st.lists(st.tuples(st.floats(0.01, 1), SECONDS), min_size=1, max_size=12), st.floats(0.001, 100))
def test_many_at_once_are_put_in_the_order_of_what_another_load_would_cost(
    records: list[tuple[float, float]], load: float
) -> None:
    chances, dues = (np.array(values) for values in zip(*records, strict=True))
    order = by_urgency(chances, dues, load).tolist()
    assert sorted(order) == list(range(len(records)))
    costs = [Need(chances[place], load, dues[place]).delayed(load) for place in order]
    assert all(first <= then + 1e-6 for first, then in itertools.pairwise(costs))


def test_where_there_is_time_for_all_the_likelier_is_the_more_urgent_then_the_first() -> None:
    assert by_urgency(np.array([0.9, 0.5, 0.9]), np.array([50.0, 50.0, 50.0]), 1.0).tolist() == [1, 2, 0]


LOAD = 0.015  # seconds; a layer takes 0.01


class Timed(World):
    """Full slots, loads that are known to take so long, and layer 0 just done."""

    def __init__(self, slots: int = 2 * LAYERS, used: tuple[int, ...] = (0, 1), load: float = LOAD) -> None:
        super().__init__(make_scheduler("lookahead", slots, SHAPE))
        self.load_seconds = load
        for step in range(3 * LAYERS):
            self.run_layer(step % LAYERS, used, lambda count: 0)
            while self.in_flight:
                self.arrive(next(iter(self.in_flight)), after=0.0)
        self.run_layer(0, used, lambda count: 0)

    def say(self, chances: dict[ExpertKey, float], layers: tuple[int, ...] = (1, 2)) -> None:
        """What the gates of layer 0 expect of each expert."""
        ahead = {layer: np.zeros(EXPERTS) for layer in layers}
        for (layer, expert), chance in chances.items():
            ahead[layer][expert] = chance
        self.start(self.scheduler.predicted(Prediction(0, tuple(ahead.items())), self.now))

    def repeat(self, tokens: int) -> None:
        """Use the same experts for so long."""
        for step in range(tokens * LAYERS):
            self.run_layer(step % LAYERS, {0, 1}, lambda count: 0)
        self.run_layer(0, {0, 1}, lambda count: 0)

    def route(self, layer: int, *experts: int) -> None:
        self.waiting = {(layer, expert) for expert in experts}
        self.start(self.scheduler.routed(layer, experts, self.now))

    def arrive(self, key: ExpertKey, after: float = LOAD) -> None:
        self.now += after
        self.slots[self.in_flight.pop(key).slot] = key
        self.start(self.scheduler.arrived(key, self.load_seconds, self.now))

    def drop(self, key: ExpertKey) -> None:
        self.in_flight.pop(key)
        self.cancelled.remove(key)
        self.start(self.scheduler.dropped(key, self.now))

    def left(self, key: ExpertKey) -> float:
        return self.scheduler.load_left(key, LOAD, self.now)


def test_a_more_urgent_prefetch_overtakes_the_one_under_way() -> None:
    world = Timed()
    world.say({(2, 4): 0.6})
    world.say({(2, 4): 0.6, (1, 3): 1.0})
    assert list(world.in_flight) == [(2, 4), (1, 3)]


def test_a_less_urgent_one_waits_until_the_link_is_idle() -> None:
    world = Timed()
    world.say({(2, 4): 1.0})
    world.say({(2, 4): 1.0, (1, 3): 0.5})
    assert list(world.in_flight) == [(2, 4)]


def test_two_prefetches_are_under_way_at_most() -> None:
    world = Timed()
    world.say({(2, 4): 0.6})
    world.say({(2, 4): 0.6, (1, 3): 0.9})
    world.say({(2, 4): 0.6, (1, 3): 0.9, (1, 5): 1.0})
    assert len(world.in_flight) == 2


def test_what_is_left_of_a_load_leaves_out_what_the_link_did_for_others() -> None:
    world = Timed(2 * LAYERS + 3)
    world.say({(2, 4): 0.6})
    world.now += 0.001
    world.route(1, 2, 3)  # both are missed and go before it
    world.arrive((1, 2))
    world.arrive((1, 3))
    assert world.left((2, 4)) == pytest.approx(LOAD - 0.001)
    world.now += 0.004
    assert world.left((2, 4)) == pytest.approx(LOAD - 0.005)


def test_an_overtaken_load_stands_still_and_goes_on_where_it_was() -> None:
    world = Timed(2 * LAYERS + 3)
    world.say({(2, 4): 0.6})
    world.now += 0.002
    world.say({(2, 4): 0.6, (1, 3): 1.0})
    world.now += 0.003
    assert world.left((2, 4)) == pytest.approx(LOAD - 0.002)
    assert world.left((1, 3)) == pytest.approx(LOAD - 0.003)
    world.arrive((1, 3), after=LOAD - 0.003)
    world.now += 0.001
    assert world.left((2, 4)) == pytest.approx(LOAD - 0.003)


def test_one_that_is_not_worth_a_slot_does_not_hold_up_the_others() -> None:
    world = Timed(load=0.01)
    world.repeat(40)  # until what is used all the time is worth much
    world.say({(1, 3): 0.6, (2, 4): 1.0, (1, 0): 1.0, (1, 1): 1.0, (2, 0): 0.0, (2, 1): 1.0})
    assert list(world.in_flight) == [(2, 4)]


def test_nothing_is_fetched_for_a_layer_that_has_run() -> None:
    world = Timed(2 * LAYERS + 1)
    world.say({(2, 4): 0.9})
    world.say({(1, 3): 0.9})
    assert world.cancelled == {(2, 4)}
    world.route(1, 0, 1)
    world.drop((2, 4))
    assert not world.in_flight


def test_what_the_host_computed_is_not_given_up_for_gates_that_do_not_speak_of_it() -> None:
    world = Timed(2 * LAYERS + 1, load=0.1)  # so long that a prefetch must be likely
    world.repeat(200)  # until what is not used is not expected
    world.scheduler.placement = Placement(Costs(0.1, 0.0, 0.0001, 0.0), lambda key: True)
    world.route(0, 3)
    assert world.on_host == [(0, 3)]
    assert list(world.in_flight) == [(0, 3)]  # for later
    world.say({(1, 0): 1.0})
    assert not world.cancelled


def test_when_slots_are_short_the_less_urgent_prefetch_is_given_up() -> None:
    world = Timed(4, used=(0,))
    world.say({(0, 5): 0.6}, layers=(1, 2, 0))
    world.now += 0.0001
    world.say({(0, 5): 0.6, (2, 4): 1.0}, layers=(1, 2, 0))
    assert list(world.in_flight) == [(0, 5), (2, 4)]
    world.route(1, 0, 1, 2)
    assert world.cancelled == {(0, 5)}
