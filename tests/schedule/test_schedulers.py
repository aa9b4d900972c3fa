"""Schedulers under random events: the contract holds at every step, and each policy does what its name says."""

import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from world import EXPERTS, LAYERS, SHAPE, World, random_prediction

from foregate.errors import ForegateError
from foregate.schedule import BOUNDS, POLICIES, Load, Prediction, Scheduler, make_scheduler
from foregate.schedule.mixtral_offloading import STAGING

Routes = list[set[int]]
ROUTES = st.lists(st.sets(st.integers(0, EXPERTS - 1), min_size=1), min_size=1, max_size=12)


def below(choose: st.DataObject):
    return lambda count: choose.draw(st.integers(0, count - 1))


def scheduler_for(policy: str, slots: int, routes: Routes) -> Scheduler:
    return make_scheduler(
        policy, slots, SHAPE, [(step % LAYERS, sorted(experts)) for step, experts in enumerate(routes)]
    )


@pytest.mark.parametrize("policy", sorted(POLICIES | BOUNDS))
@settings(deadline=None)  # a busy machine is no failure
@given(slots=st.integers(1, LAYERS * EXPERTS), routes=ROUTES, choose=st.data())
def test_every_expert_is_served_from_the_right_slot(
    policy: str, slots: int, routes: Routes, choose: st.DataObject
) -> None:
    world, pick = World(scheduler_for(policy, slots, routes)), below(choose)
    for step, experts in enumerate(routes):
        world.run_layer(step % LAYERS, experts, pick, random_prediction(step % LAYERS, pick))
    world.finish_all()


@pytest.mark.parametrize("policy", sorted(POLICIES | BOUNDS))
def test_ten_thousand_steps_with_the_smallest_budgets(policy: str) -> None:
    random = np.random.default_rng(0)
    routes = [set(random.choice(EXPERTS, 2, replace=False).tolist()) for _ in range(10_000 // 4)]
    pick = lambda count: int(random.integers(count))  # noqa: E731
    for slots in (1, 2, 3, 7):
        world = World(scheduler_for(policy, slots, routes))
        for step, experts in enumerate(routes):
            world.run_layer(step % LAYERS, experts, pick, random_prediction(step % LAYERS, pick))


@settings(deadline=None)
@given(
    slots=st.integers(1, LAYERS * EXPERTS), routes=st.lists(st.integers(0, EXPERTS - 1), max_size=40), choose=st.data()
)
def test_lru_loads_exactly_what_a_textbook_lru_misses(slots: int, routes: list[int], choose: st.DataObject) -> None:
    world, textbook, misses = World(make_scheduler("lru", slots, SHAPE)), OrderedDict(), 0
    for step, expert in enumerate(routes):
        key = (step % LAYERS, expert)
        if key in textbook:
            textbook.move_to_end(key)
        else:
            misses += 1
            if len(textbook) == slots:
                textbook.popitem(last=False)
            textbook[key] = None
        world.run_layer(key[0], {expert}, below(choose))
    assert len(world.loads) == misses


@settings(deadline=None)
@given(routes=ROUTES, choose=st.data())
def test_demand_keeps_nothing(routes: Routes, choose: st.DataObject) -> None:
    world = World(make_scheduler("demand", EXPERTS, SHAPE))
    for step, experts in enumerate(routes):
        world.run_layer(step % LAYERS, experts, below(choose))
        assert not any(world.scheduler.is_resident((n, e)) for n in range(LAYERS) for e in range(EXPERTS))
    assert len(world.loads) == sum(len(experts) for experts in routes)


@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - {"demand"}))
def test_with_room_for_all_each_expert_is_loaded_once(policy: str) -> None:
    world = World(make_scheduler(policy, LAYERS * EXPERTS + STAGING, SHAPE))
    for _ in range(3):
        for layer in range(LAYERS):
            world.run_layer(layer, range(EXPERTS), lambda count: 0)
    assert len(world.loads) == LAYERS * EXPERTS


@settings(deadline=None)
@given(slots=st.integers(2, LAYERS * EXPERTS), routes=st.lists(st.integers(0, EXPERTS - 1), max_size=40))
def test_patient_clairvoyant_never_loads_more_than_belady(slots: int, routes: list[int]) -> None:
    """With a link that is done at once, loads are those of the offline optimum for demand loading, or fewer."""
    keys = [(step % LAYERS, expert) for step, expert in enumerate(routes)]
    held: set[tuple[int, int]] = set()
    misses = 0
    for step, key in enumerate(keys):
        if key not in held:
            misses += 1
            if len(held) == slots:
                rest = keys[step + 1 :]
                held.remove(max(held, key=lambda other: rest.index(other) if other in rest else len(keys)))
            held.add(key)
    world = World(make_scheduler("clairvoyant-patient", slots, SHAPE, [(layer, [expert]) for layer, expert in keys]))
    for layer, expert in keys:
        world.run_layer(layer, {expert}, lambda count: 0)
        world.finish_all()
    assert len(world.loads) <= misses


def test_mixtral_offloading_keeps_a_cache_for_every_layer_and_stages_guesses() -> None:
    """Two slots a layer. A guess lies in a staging buffer, evicts nothing, and enters the cache when it is used."""
    world = World(make_scheduler("mixtral-offloading", 2 * LAYERS + STAGING, SHAPE))
    assert world.scheduler.slots == 2 * LAYERS + STAGING
    first = lambda count: 0  # noqa: E731
    for layer in range(LAYERS):
        world.run_layer(layer, {0, 1}, first)
    guess = np.array([0.0, 0.0, 0.9, 0.8, 0.1, 0.0])
    world.scheduler.routed(0, [0], tokens=1)
    world.start(world.scheduler.predicted(Prediction(0, ((1, guess),))))
    world.start(world.scheduler.computed([(0, 0)]))
    world.finish_all()
    assert [(load.key, load.demand) for load in world.loads[-2:]] == [((1, 2), False), ((1, 3), False)]
    assert all(world.scheduler.is_resident((1, expert)) for expert in (0, 1, 2, 3))
    world.run_layer(1, {2}, first)
    assert not world.scheduler.is_resident((1, 0)), "the guess that was used takes the place of the oldest"
    assert world.scheduler.is_resident((1, 1))


def test_mixtral_offloading_code_sends_the_evicted_record_back() -> None:
    world = World(make_scheduler("mixtral-offloading-code", LAYERS, SHAPE))
    for expert in (0, 1):
        world.run_layer(0, {expert}, lambda count: 0)
    assert [load.back for load in world.loads] == [None, (0, 0)]


def test_a_policy_that_evicts_what_is_in_use_is_stopped() -> None:
    class Careless(Scheduler):
        def victim(self) -> tuple[int, int]:
            return (0, 0)

    scheduler = Careless(1, SHAPE)
    scheduler.routed(0, [0])
    scheduler.arrived((0, 0))
    scheduler.computed([(0, 0)])
    scheduler.routed(1, [0])
    scheduler.arrived((1, 0))
    with pytest.raises((RuntimeError, KeyError)):
        scheduler.routed(1, [0, 1])


def test_a_layer_cannot_start_before_the_last_one_is_done() -> None:
    scheduler = make_scheduler("lru", 2, SHAPE)
    scheduler.routed(0, [1])
    with pytest.raises(RuntimeError, match="not computed"):
        scheduler.routed(1, [1])


def test_unknown_policy_lists_the_known() -> None:
    with pytest.raises(ForegateError, match="unknown policy best: choose one of demand, lookahead, lru, mixtral"):
        make_scheduler("best", 4, SHAPE)
    with pytest.raises(ForegateError, match="clairvoyant must know the future"):
        make_scheduler("clairvoyant", 4, SHAPE)


def test_schedulers_import_neither_torch_nor_io() -> None:
    code = "import sys, foregate.schedule; print({'torch', 'transformers', 'mmap', 'socket'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_load_is_for_demand_unless_it_says_otherwise() -> None:
    assert Load((0, 0), 0).demand
