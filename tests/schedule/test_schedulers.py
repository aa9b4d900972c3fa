"""Schedulers under random events: the contract holds at every step, and LRU is LRU."""

import subprocess
import sys
from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foregate.errors import ForegateError
from foregate.schedule import POLICIES, Load, Scheduler, make_scheduler

EXPERTS = 6
LAYERS = 3
Routes = list[set[int]]
ROUTES = st.lists(st.sets(st.integers(0, EXPERTS - 1), min_size=1), min_size=1, max_size=12)


class World:
    """Carries out a scheduler's loads like a device would, and checks what it may rely on."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.slots: dict[int, tuple[int, int]] = {}  # what the bytes in each slot are
        self.in_flight: list[Load] = []
        self.loads = 0

    def start(self, loads: list[Load]) -> None:
        for load in loads:
            assert load.slot not in {other.slot for other in self.in_flight}, "two loads into one slot"
            self.slots.pop(load.slot, None)
            self.in_flight.append(load)
            self.loads += 1
        self.scheduler.check_integrity()
        assert len(self.slots) + len(self.in_flight) <= self.scheduler.slots

    def finish_one(self, choice: int) -> None:
        load = self.in_flight.pop(choice % len(self.in_flight))
        self.slots[load.slot] = load.key
        self.start(self.scheduler.arrived(load.key))

    def run_layer(self, layer: int, experts: set[int], choose: st.DataObject) -> None:
        """Serve one layer, computing and finishing loads in an arbitrary order."""
        self.start(self.scheduler.routed(layer, sorted(experts)))
        waiting = set(experts)
        while waiting:
            ready = sorted(e for e in waiting if self.scheduler.is_resident((layer, e)))
            assert ready or self.in_flight, "deadlock: nothing resident and nothing on its way"
            pick = choose.draw(st.integers(0, len(ready) + len(self.in_flight) - 1))
            if pick < len(ready):
                key = (layer, ready[pick])
                assert self.slots[self.scheduler.slot(key)] == key, "the slot holds another record"
                waiting.remove(ready[pick])
                self.start(self.scheduler.computed(key))
            else:
                self.finish_one(pick - len(ready))
        while self.in_flight:
            self.finish_one(0)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@given(slots=st.integers(1, LAYERS * EXPERTS), routes=ROUTES, choose=st.data())
def test_every_expert_is_served_from_the_right_slot(
    policy: str, slots: int, routes: Routes, choose: st.DataObject
) -> None:
    world = World(make_scheduler(policy, slots))
    for step, experts in enumerate(routes):
        world.run_layer(step % LAYERS, experts, choose)


@given(
    slots=st.integers(1, LAYERS * EXPERTS), routes=st.lists(st.integers(0, EXPERTS - 1), max_size=40), choose=st.data()
)
def test_lru_loads_exactly_what_a_textbook_lru_misses(slots: int, routes: list[int], choose: st.DataObject) -> None:
    world, textbook, misses = World(make_scheduler("lru", slots)), OrderedDict(), 0
    for step, expert in enumerate(routes):
        key = (step % LAYERS, expert)
        if key in textbook:
            textbook.move_to_end(key)
        else:
            misses += 1
            if len(textbook) == slots:
                textbook.popitem(last=False)
            textbook[key] = None
        world.run_layer(key[0], {expert}, choose)
    assert world.loads == misses


@given(routes=ROUTES, choose=st.data())
def test_demand_keeps_nothing(routes: Routes, choose: st.DataObject) -> None:
    world = World(make_scheduler("demand", EXPERTS))
    for step, experts in enumerate(routes):
        world.run_layer(step % LAYERS, experts, choose)
        assert not any(world.scheduler.is_resident((n, e)) for n in range(LAYERS) for e in range(EXPERTS))
    assert world.loads == sum(len(experts) for experts in routes)


def test_lru_with_room_for_all_loads_each_expert_once() -> None:
    scheduler = make_scheduler("lru", LAYERS * EXPERTS)
    for _ in range(3):
        for layer in range(LAYERS):
            for load in scheduler.routed(layer, range(EXPERTS)):
                scheduler.arrived(load.key)
            for expert in range(EXPERTS):
                assert not scheduler.computed((layer, expert))
    assert all(scheduler.is_resident((n, e)) for n in range(LAYERS) for e in range(EXPERTS))


def test_a_policy_that_evicts_what_is_in_use_is_stopped() -> None:
    class Careless(Scheduler):
        def victim(self) -> tuple[int, int]:
            return (0, 0)

    scheduler = Careless(1)
    scheduler.routed(0, [0])
    scheduler.arrived((0, 0))
    scheduler.computed((0, 0))
    scheduler.routed(1, [0])
    scheduler.arrived((1, 0))
    with pytest.raises((RuntimeError, KeyError)):
        scheduler.routed(1, [0, 1])


def test_a_layer_cannot_start_before_the_last_one_is_done() -> None:
    scheduler = make_scheduler("lru", 2)
    scheduler.routed(0, [1])
    with pytest.raises(RuntimeError, match="not computed"):
        scheduler.routed(1, [1])


def test_unknown_policy_lists_the_known() -> None:
    with pytest.raises(ForegateError, match="unknown policy best: choose one of demand, lookahead, lru"):
        make_scheduler("best", 4)


def test_schedulers_import_neither_torch_nor_io() -> None:
    code = "import sys, foregate.schedule; print({'torch', 'transformers', 'numpy', 'mmap'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
