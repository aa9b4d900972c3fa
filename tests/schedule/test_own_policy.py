"""A policy that somebody registers is one like the rest: served, simulated, told what it asks for, and without a say in the text."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from world import EXPERTS, LAYERS, SHAPE, World, random_prediction

import foregate
from foregate.errors import ForegateError
from foregate.lookahead.trace import Trace
from foregate.lookahead.untrained import untrained_of_trace
from foregate.schedule import (
    GATES,
    NEXT_ROUTER,
    POLICIES,
    Action,
    ExpertKey,
    Prediction,
    Scheduler,
    Shape,
    make_scheduler,
    register,
    told_by,
)
from foregate.simulate.cells import simulate_cells
from foregate.simulate.machine import Machine
from foregate.simulate.workload import Workload

NAMES = itertools.count()


class FirstInFirstOut(Scheduler):
    """Evicts what has been there longest."""

    def __init__(self, slots: int, shape: Shape) -> None:
        super().__init__(slots, shape)
        self._order: list[ExpertKey] = []

    def used(self, key: ExpertKey) -> None:
        if key not in self._order:
            self._order.append(key)

    def evicted(self, key: ExpertKey) -> None:
        self._order.remove(key)

    def victim(self) -> ExpertKey | None:
        return next((key for key in self._order if self.evictable(key)), None)


class Listening(FirstInFirstOut):
    """The same, and notes what it is told."""

    told_by = GATES
    heard: list[Prediction]

    def __init__(self, slots: int, shape: Shape) -> None:
        super().__init__(slots, shape)
        type(self).heard = []

    def wants_predictions(self) -> bool:
        return True

    def predicted(self, prediction: Prediction, now: float = 0.0) -> list[Action]:
        self.heard.append(prediction)
        return []


class Guessing(Listening):
    told_by = NEXT_ROUTER


@pytest.fixture
def name() -> Iterator[str]:
    """Free for a policy, and free again afterwards."""
    name = f"own-{next(NAMES)}"
    yield name
    POLICIES.pop(name, None)


def greedy(store: Path, policy: str) -> torch.Tensor:
    model = foregate.load(store, memory="12.5%", policy=policy, threads=1)
    ids = model.generate(torch.arange(50, 62)[None], max_new_tokens=12, do_sample=False)
    model.foregate.close()
    return ids


@pytest.fixture(scope="module")
def lru_text(demo_store: Path) -> torch.Tensor:
    return greedy(demo_store, "lru")


def test_the_text_is_that_of_every_other_policy(name: str, demo_store: Path, lru_text: torch.Tensor) -> None:
    register(name, FirstInFirstOut)
    assert torch.equal(greedy(demo_store, name), lru_text)


@pytest.mark.parametrize(("policy", "layers_ahead"), [(Listening, 3), (Guessing, 1)])
def test_a_running_model_tells_it_what_it_asks_for(
    name: str, policy: type[Listening], layers_ahead: int, demo_store: Path, lru_text: torch.Tensor
) -> None:
    register(name, policy)
    assert torch.equal(greedy(demo_store, name), lru_text)
    assert {len(prediction.ahead) for prediction in policy.heard} == {layers_ahead}
    assert {prediction.layer for prediction in policy.heard} >= set(range(11))


def test_it_is_simulated_and_told_what_it_asks_for(name: str, demo_trace: Path) -> None:
    register(name, Listening)
    trace = Trace(demo_trace)
    workload = Workload(trace, untrained_of_trace(trace, 3), slice(0, 40))
    machine = Machine(record_bytes=1 << 20, link_bandwidth=1e9, layer_seconds=1e-3, expert_seconds=1e-3)
    (cell,) = simulate_cells(workload, ["lru", name], ["25%"], [1e9], machine)
    assert [result.policy for result in cell] == ["lru", name]
    assert 0 < cell[1].hit_rate < 1
    assert len(Listening.heard) >= 40 * 12
    with pytest.raises(ForegateError, match=f"policy {name} needs gates"):
        Workload(trace, None, slice(0, 40)).calls(name)


def test_it_keeps_the_contract(name: str) -> None:
    register(name, Listening)
    random = np.random.default_rng(0)
    pick = lambda count: int(random.integers(count))  # noqa: E731
    for slots in (1, 4, LAYERS * EXPERTS):
        world = World(make_scheduler(name, slots, SHAPE))
        for step in range(300):
            experts = random.choice(EXPERTS, 2, replace=False).tolist()
            world.run_layer(step % LAYERS, experts, pick, random_prediction(step % LAYERS, pick))


def test_a_name_stands_for_the_newest_class(name: str) -> None:
    register(name, FirstInFirstOut)
    register(name, Listening)
    assert type(make_scheduler(name, 4, SHAPE)) is Listening
    assert told_by(name) == GATES


@pytest.mark.parametrize("taken", ["auto", "lru", "lookahead", "clairvoyant"])
def test_names_of_foregate_stay_its_own(taken: str) -> None:
    with pytest.raises(ForegateError, match=f"there is a policy {taken} already: register yours under another name"):
        register(taken, FirstInFirstOut)


@pytest.mark.parametrize("what", [FirstInFirstOut(1, SHAPE), dict, "lru"])
def test_only_classes_of_schedulers_are_policies(name: str, what: object) -> None:
    with pytest.raises(TypeError, match=r"is not a subclass of foregate.schedule.Scheduler"):
        register(name, what)  # type: ignore[arg-type]
    assert name not in POLICIES


def test_an_unknown_policy_is_told_nothing_but_refused(demo_store: Path) -> None:
    with pytest.raises(ForegateError, match="unknown policy best: choose one of demand, lookahead"):
        told_by("best")
    with pytest.raises(ForegateError, match="unknown policy best"):
        foregate.load(demo_store, policy="best")
