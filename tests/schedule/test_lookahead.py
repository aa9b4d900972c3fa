"""The lookahead policy: what it evicts, what it fetches, and that it believes only what comes true."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from world import EXPERTS, LAYERS, SHAPE, World

from foregate.schedule import Load, Prediction, Shape, make_scheduler
from foregate.schedule.estimates import BLOCK, LEAST, LOSS, REST, Calibration, Pace, Worth, tokens_passing

FIRST = lambda count: 0  # noqa: E731


def certain(*experts: int) -> np.ndarray:
    probabilities = np.zeros(EXPERTS)
    probabilities[list(experts)] = 1.0
    return probabilities


def filled(slots: int) -> World:
    """A world whose slots are full, in which loads have been timed."""
    world = World(make_scheduler("lookahead", slots, SHAPE))
    for step in range(3 * LAYERS):
        world.run_layer(step % LAYERS, {0, 1}, FIRST)
        world.finish_all()
    return world


def test_a_foreseen_expert_is_fetched_before_it_is_routed() -> None:
    world = filled(2 * LAYERS)
    before = len(world.loads)
    world.run_layer(0, {0, 1}, FIRST, Prediction(0, ((1, certain(4)),)))
    world.finish_all()
    assert [(load.key, load.demand) for load in world.loads[before:]] == [((1, 4), False)]
    world.run_layer(1, {4}, FIRST)
    assert len(world.loads) == before + 1
    assert world.scheduler.prefetches.in_time == 1


def test_what_is_expected_stays() -> None:
    world = filled(2 * LAYERS)
    world.run_layer(0, {0, 1}, FIRST, Prediction(0, ((1, certain(0, 1)), (2, certain(3)))))
    world.run_layer(1, {0, 1}, FIRST)
    world.run_layer(2, {3}, FIRST)
    assert all(world.scheduler.is_resident((1, expert)) for expert in (0, 1)) or world.scheduler.is_resident((0, 0))
    assert not (world.scheduler.is_resident((2, 0)) and world.scheduler.is_resident((2, 1)))


def test_a_prefetch_that_was_not_chosen_is_cancelled() -> None:
    world = filled(2 * LAYERS + 1)
    world.run_layer(0, {0, 1}, FIRST, Prediction(0, ((1, certain(4)),)))
    assert list(world.in_flight) == [(1, 4)]
    world.run_layer(1, {0, 1}, FIRST)
    assert world.cancelled == {(1, 4)}
    world.finish_all()
    assert world.scheduler.prefetches.wasted == 1


def test_useless_predictions_lose_their_voice() -> None:
    """Certain, and never right: after a while nothing is fetched for them."""
    world = filled(2 * LAYERS)
    for step in range(200 * LAYERS):
        if step == 150 * LAYERS:
            before = world.scheduler.prefetches.started
        wrong = Prediction(step % LAYERS, (((step + 1) % LAYERS, certain(4)),))
        world.run_layer(step % LAYERS, {0, 1}, FIRST, wrong)
        world.finish_all()
    assert world.scheduler.prefetches.started == before


@given(st.lists(st.floats(0, 1), min_size=9, max_size=9))
def test_tokens_passing_is_a_sum_of_survival(values: list[float]) -> None:
    """Against the same sum, one token at a time."""
    reuse = np.maximum.accumulate(np.array(values).reshape(3, 3), axis=0)
    rest, passing = tokens_passing(reuse)
    for expert in range(3):
        s1, s4, s16 = np.maximum(1 - reuse[:, expert], LEAST)
        fall = min((s16 / s4) ** (1 / 12), 1 - 1 / 4096)
        total = s1
        total += sum((s1 + (s4 - s1) * n / 3 + s1 + (s4 - s1) * (n + 1) / 3) / 2 for n in range(3))
        total += sum((s4 + (s16 - s4) * n / 12 + s4 + (s16 - s4) * (n + 1) / 12) / 2 for n in range(12))
        total += s16 / (1 - fall)
        assert passing[expert] == pytest.approx(total, rel=1e-6)
        assert rest[expert] == s1


def test_calibration_finds_the_true_rate() -> None:
    random, calibration = np.random.default_rng(0), Calibration(2)
    given_out, first_cells = np.full(16, 0.9), Calibration.first_cells(np.repeat([0, 1], 8))
    for _ in range(600):
        _, cells = calibration.correct(given_out, first_cells)
        calibration.learn([cells[:8]], np.flatnonzero(random.random(8) < 0.25))
        calibration.learn([cells[8:]], np.flatnonzero(random.random(8) < 0.9))
    likely, _ = calibration.correct(given_out, first_cells)
    assert likely[:8] == pytest.approx(0.25, abs=0.05)
    assert likely[8:] == pytest.approx(0.9, abs=0.05)


def test_a_prefetch_must_be_likelier_the_less_it_can_hide() -> None:
    pace = Pace()
    for call in range(50):
        pace.layer_call(0.010 * call)
        pace.waited(0.005)
        pace.load(0.040)
    assert pace.layer_seconds == pytest.approx(0.005)
    near, far, farther = (pace.least_probability(distance) for distance in (1.0, 4.0, 400.0))
    assert near > far > farther
    assert near == pytest.approx(LOSS * 0.040 / (0.005 + LOSS * 0.040))
    assert farther == pytest.approx(LOSS / (1 + LOSS))


def test_gates_that_cost_more_than_there_is_to_save_rest_longer_and_longer() -> None:
    worth = Worth()
    silent = []
    for _ in range(400):
        if worth.listening:
            worth.spent(0.001)
        worth.next_token()
        silent.append(not worth.listening)
    runs = "".join("s" if quiet else "l" for quiet in silent).split("l")
    assert [len(run) for run in runs if run][:3] == [REST, 2 * REST, 4 * REST]
    for _ in range(400):
        worth.saved(0.01)
        worth.spent(0.001)
        worth.next_token()
    assert worth.listening
    assert BLOCK < REST


@pytest.mark.parametrize(("alone", "listens"), [(0.001, False), (0.010, True)])
def test_gates_of_unclear_worth_are_tried_against_none(alone: float, listens: bool) -> None:
    """They seem to save three times what they take. Without them tokens wait 1 or 10 ms; with them 2 ms, and 1 ms for them."""
    worth, silent = Worth(), 0
    for _ in range(300):
        if worth.listening:
            worth.spent(0.001)
            worth.saved(0.003)
        worth.waited(0.002 if worth.listening else alone)
        worth.next_token()
        silent += not worth.listening
    assert silent == BLOCK * 2 if listens else silent > 200


def test_cost_and_memory_do_not_grow_with_tokens() -> None:
    """64 experts, horizon 4: the 10,000th token takes what the 100th took, and nothing is kept of the others."""
    import tracemalloc

    layers, experts, top_k = 4, 64, 8
    scheduler = make_scheduler("lookahead", 96, Shape((experts,) * layers, (top_k,) * layers))
    random = np.random.default_rng(0)
    routes = [[random.choice(experts, top_k, replace=False).tolist() for _ in range(layers)] for _ in range(50)]
    guesses = [
        tuple((n % layers, random.random(experts)) for n in range(layer + 1, layer + 5)) for layer in range(layers)
    ]
    reuse = random.random((3, experts))

    def token(number: int) -> float:
        spent = 0.0
        for layer in range(layers):
            start = time.process_time()
            actions = scheduler.routed(layer, routes[number % 50][layer], number * 0.1)
            actions += scheduler.predicted(Prediction(layer, guesses[layer], reuse), number * 0.1)
            spent += time.process_time() - start
            settle(scheduler, actions, number * 0.1)
            used = [(layer, expert) for expert in routes[number % 50][layer]]
            settle(scheduler, scheduler.computed(used, number * 0.1), number * 0.1)
        return spent

    early = min(sum(token(n) for n in range(start, start + 20)) for start in (100, 120, 140))
    tracemalloc.start()
    for number in range(160, 10_000 // layers):
        token(number)
    growth = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    late = min(sum(token(n) for n in range(start, start + 20)) for start in (9000, 9020, 9040))
    assert late < 3 * early
    assert growth < 2_000_000


def settle(scheduler, actions: list, now: float) -> None:
    """Every load is done at once."""
    while actions:
        action = actions.pop(0)
        if isinstance(action, Load):
            actions += scheduler.arrived(action.key, 0.001, now)
        elif not hasattr(action, "slot") and type(action).__name__ == "Cancel":
            actions += scheduler.dropped(action.key, now)
