"""What the link brings first: the order in which compute is expected to wait less."""

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st
from world import EXPERTS, LAYERS, SHAPE, World

from foregate.schedule import Prediction, make_scheduler
from foregate.schedule.urgency import Need

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


def started(load_seconds: float, *predictions: dict[tuple[int, int], float]) -> list[tuple[tuple[int, int], bool]]:
    """What is loaded, and whether for demand, when layer 0 runs and the gates say one thing after the other.

    All slots are full, loads are known to take so long and layers 0.01 s. predictions: {(layer, expert): chance}.
    """
    world = World(make_scheduler("lookahead", 2 * LAYERS, SHAPE))
    for step in range(3 * LAYERS):
        world.run_layer(step % LAYERS, {0, 1}, lambda count: 0)
        while world.in_flight:
            key = next(iter(world.in_flight))
            world.slots[world.in_flight.pop(key).slot] = key
            world.start(world.scheduler.arrived(key, load_seconds, world.now))
    before = len(world.loads)
    world.run_layer(0, {0, 1}, lambda count: 0)
    for chances in predictions:
        ahead = {layer: np.zeros(EXPERTS) for layer in (1, 2)}
        for (layer, expert), chance in chances.items():
            ahead[layer][expert] = chance
        world.start(world.scheduler.predicted(Prediction(0, tuple(ahead.items())), world.now))
    return [(load.key, load.demand) for load in world.loads[before:]]


def test_a_more_urgent_prefetch_overtakes_the_one_under_way() -> None:
    news = {(1, 3): 1.0, (2, 4): 0.6}
    assert started(0.015, {(2, 4): 0.6}, news) == [((2, 4), False), ((1, 3), False)]


def test_a_less_urgent_one_waits_until_the_link_is_idle() -> None:
    news = {(1, 3): 0.5, (2, 4): 1.0}
    assert started(0.015, {(2, 4): 1.0}, news) == [((2, 4), False)]


def test_two_prefetches_are_under_way_at_most() -> None:
    first, second, third = {(2, 4): 0.6}, {(2, 4): 0.6, (1, 3): 0.9}, {(2, 4): 0.6, (1, 3): 0.9, (1, 5): 1.0}
    assert len(started(0.015, first, second, third)) == 2
