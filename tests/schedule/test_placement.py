"""Placement: misses are divided as well as they can be, and every expert is still served exactly once."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from world import EXPERTS, LAYERS, SHAPE, World, random_prediction

from foregate.schedule import BOUNDS, POLICIES, Compute, Costs, Load, Placement, Prediction, make_scheduler

SECONDS = st.floats(0.001, 1.0)


@given(
    left=st.lists(st.one_of(st.just(0.5), st.floats(0.0, 0.5)), min_size=1, max_size=6),
    host=SECONDS,
    device=st.floats(0.0, 0.1),
    tokens=st.integers(1, 8),
)
def test_no_other_division_is_done_sooner(left: list[float], host: float, device: float, tokens: int) -> None:
    placement = Placement(Costs(0.5, device, host, host / 4), lambda key: True)
    each, misses = placement.host_seconds(tokens), {(0, expert): seconds for expert, seconds in enumerate(left)}

    def done(on_host: set[tuple[int, int]]) -> float:
        link = sum(seconds for key, seconds in misses.items() if key not in on_host)
        return max(link + device, each * len(on_host))

    chosen = placement.split(misses, tokens)
    subsets = itertools.chain.from_iterable(itertools.combinations(misses, n) for n in range(len(misses) + 1))
    assert done(set(chosen)) <= min(done(set(subset)) for subset in subsets) + 1e-9


def test_both_finish_together_and_what_is_best_kept_is_loaded() -> None:
    placement = Placement(Costs(load=0.3, device=0.0, host=0.1, host_token=0.0), lambda key: True)
    misses = {(0, expert): 0.3 for expert in (5, 3, 1, 0)}
    assert placement.split(misses, 1) == [(0, 0), (0, 1), (0, 3)]


def test_what_host_memory_does_not_hold_comes_over_the_link() -> None:
    placement = Placement(Costs(load=0.3, device=0.0, host=0.01, host_token=0.0), lambda key: key[1] == 1)
    assert placement.split({(0, expert): 0.3 for expert in range(4)}, 1) == [(0, 1)]


def test_many_tokens_are_the_devices() -> None:
    placement = Placement(Costs(load=0.3, device=0.0, host=0.1, host_token=0.1), lambda key: True)
    assert placement.split({(0, 0): 0.3}, 1)
    assert not placement.split({(0, 0): 0.3}, 4)


def test_estimates_follow_what_happens() -> None:
    placement = Placement(Costs(load=0.3, device=0.0, host=0.1, host_token=0.05), lambda key: True)
    for _ in range(300):
        placement.loaded(0.1)
        placement.computed(experts=2, tokens=3, seconds=1.6)  # foretold: 0.2 s each
    assert placement.load_seconds == pytest.approx(0.1, rel=0.01)
    assert placement.host_seconds(1) == pytest.approx(0.4, rel=0.01)
    assert not placement.split({(0, 0): 0.1}, 1)


def test_a_disturbed_host_is_tried_again() -> None:
    placement = Placement(Costs(load=0.3, device=0.0, host=0.2, host_token=0.0), lambda key: True)
    placement.computed(experts=1, tokens=1, seconds=60.0)
    assert placement.split({(0, 0): 0.3}, 1), "once is no habit"
    for _ in range(20):
        placement.computed(experts=1, tokens=1, seconds=2.0)
    tries = [bool(placement.split({(0, 0): 0.3}, 1)) for _ in range(600)]
    assert tries.index(True) in range(100, 300)


def test_what_was_computed_on_the_host_is_loaded_when_the_link_is_idle() -> None:
    """With a link that is always slower, a cache would otherwise stay as empty as it was."""
    for policy in ("lru", "lookahead"):
        scheduler = make_scheduler(policy, 2, SHAPE)
        scheduler.placement = Placement(Costs(load=1.0, device=0.0, host=0.1, host_token=0.0), lambda key: True)
        assert scheduler.routed(0, [4]) == [Compute((0, 4)), Load((0, 4), 0, demand=False)]
        scheduler.arrived((0, 4), 1.0)
        assert not scheduler.routed(0, [4])
        assert scheduler.is_resident((0, 4))


def test_a_prefetch_that_is_almost_there_is_waited_for_and_a_fresh_one_goes_on_for_later() -> None:
    for now, computed in ((10.01, True), (10.28, False)):
        scheduler = make_scheduler("lookahead", 4, SHAPE)
        scheduler.placement = Placement(Costs(load=0.3, device=0.0, host=0.1, host_token=0.0), lambda key: True)
        scheduler.routed(0, [], 10.0)
        likely = np.zeros(EXPERTS)
        likely[2] = 1.0
        assert scheduler.predicted(Prediction(0, ((1, likely),)), 10.0) == [Load((1, 2), 0, demand=False)]
        actions = scheduler.routed(1, [2], now)
        assert (Compute((1, 2)) in actions) is computed
        scheduler.arrived((1, 2), 0.3, 10.3)
        assert scheduler.is_resident((1, 2))
        scheduler.computed([] if computed else [(1, 2)], 10.3)
        scheduler.check_integrity()


@pytest.mark.parametrize("policy", sorted(POLICIES | BOUNDS))
@settings(deadline=None)
@given(
    slots=st.integers(1, LAYERS * EXPERTS),
    routes=st.lists(st.sets(st.integers(0, EXPERTS - 1), min_size=1), min_size=1, max_size=12),
    host=st.sampled_from([0.001, 0.004, 0.01, 0.05]),
    choose=st.data(),
)
def test_every_expert_is_served_once(
    policy: str, slots: int, routes: list[set[int]], host: float, choose: st.DataObject
) -> None:
    pick = lambda count: choose.draw(st.integers(0, count - 1))  # noqa: E731
    run(policy, slots, routes, host, pick)


@pytest.mark.parametrize("policy", sorted(POLICIES | BOUNDS))
def test_ten_thousand_steps_with_the_smallest_budgets_and_placement(policy: str) -> None:
    random = np.random.default_rng(0)
    routes = [set(random.choice(EXPERTS, 2, replace=False).tolist()) for _ in range(10_000 // 4)]
    for slots in (1, 2, 3, 7):
        world = run(policy, slots, routes, 0.004, lambda count: int(random.integers(count)))
        assert world.on_host
        assert world.loads


def run(policy: str, slots: int, routes: list[set[int]], host: float, pick) -> World:
    """Layers with placement. Whether a record lies in host memory is chance: some are on the disk only."""
    future = [(step % LAYERS, sorted(experts)) for step, experts in enumerate(routes)]
    scheduler = make_scheduler(policy, slots, SHAPE, future)
    scheduler.placement = Placement(Costs(0.01, 0.0, host, host / 2), lambda key: pick(4) > 0)
    world = World(scheduler)
    for step, experts in enumerate(routes):
        world.run_layer(step % LAYERS, experts, pick, random_prediction(step % LAYERS, pick))
    world.finish_all()
    return world
