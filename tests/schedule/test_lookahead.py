"""The lookahead policy: what it evicts, what it fetches, and that it believes only what comes true."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from world import EXPERTS, LAYERS, SHAPE, TOP_K, World, random_prediction

from foregate.schedule import Cancel, ExpertKey, Load, Prediction, Shape, make_scheduler
from foregate.schedule.estimates import (
    BLOCK,
    DELAYED,
    EVICTED,
    JUDGED,
    LATER,
    LEAST,
    REST,
    Calibration,
    Discount,
    Frequency,
    Pace,
    ReuseEstimate,
    Worth,
    expected_loss,
)
from foregate.schedule.lookahead import LookaheadScheduler

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


def test_every_horizon_is_judged() -> None:
    """Certain and never right at any of seven horizons, from any layer: none of them keeps its voice."""
    scheduler = make_scheduler("lookahead", 16, Shape((EXPERTS,) * 8, (TOP_K,) * 8))
    heard = set()
    for call in range(4000):
        layer = call % 8
        scheduler.routed(layer, [])
        scheduler.predicted(Prediction(layer, tuple(((layer + step) % 8, certain(4)) for step in range(1, 8))))
        heard |= {(layer, *key) for key in scheduler.expected()} if call >= 4000 - 8 else set()
    assert not heard


class Checked(LookaheadScheduler):
    """Looks for every victim the slow way too."""

    def victim(self) -> ExpertKey | None:
        found = super().victim()
        self._refresh()
        value = {key: self._value[key] for key in self._slot_of if self.evictable(key)}
        assert found == min(sorted(value), key=value.__getitem__, default=None)
        return found


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(1, LAYERS * EXPERTS), st.lists(st.sets(st.integers(0, EXPERTS - 1), min_size=1)), st.data())
def test_the_victim_is_the_resident_record_that_is_worth_least(slots: int, routes: list, data: st.DataObject) -> None:
    """What is kept up to date between predictions is what a fresh look would find."""
    world, pick = World(Checked(slots, SHAPE)), lambda count: data.draw(st.integers(0, count - 1))
    for call, experts in enumerate(routes):
        world.run_layer(call % LAYERS, experts, pick, random_prediction(call % LAYERS, pick))


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


def discount(residence: float, layers: int = LAYERS) -> Discount:
    """One under which a record stays so many calls."""
    made = Discount(1000, Shape((EXPERTS,) * layers, (TOP_K,) * layers))
    for _ in range(2000):
        made.call()
        for _ in range(round(1000 / residence)):
            made.load()
    made.renew()
    return made


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.sampled_from([4.0, 20.0, 100.0]))
def test_worth_is_the_discounted_first_use(values: list[float], residence: float) -> None:
    """Against the same expectation, use by use: in the next token, or so many tokens after it."""
    made, windows = discount(residence), np.maximum.accumulate(np.array(values))
    skip, lost = expected_loss(windows[:, None], made.after_windows)
    r1, r4, r16 = np.minimum(windows, 1 - LEAST)
    chances = [r1, r4 - r1, r16 - r4, 1 - r16]
    worth = sum(chance * made.token**later for chance, later in zip(chances, [0.0, *LATER], strict=True))
    assert 1 - skip[0] * lost[0] == pytest.approx(worth, abs=1e-9)
    assert 0 <= lost[0] <= 1


def test_worth_by_frequency_is_a_geometric_series() -> None:
    shape, made = Shape((EXPERTS,), (TOP_K,)), discount(8.0, layers=1)
    reuse = ReuseEstimate(shape, made)
    for number in range(400):
        reuse.routed(0, [0, 1] if number % 2 else [0, 2], judge=False)
    rates = 1 - reuse.skip[0]
    assert rates == pytest.approx([1 - LEAST, 0.5, 0.5, LEAST, LEAST, LEAST], abs=0.02)
    for rate, lost in zip(rates, reuse.lost[0], strict=True):
        later = sum(rate * (1 - rate) ** (token - 1) * made.token**token for token in range(1, 2000))
        assert lost == pytest.approx(1 - later, rel=1e-3)


def test_a_frequency_fades_by_half_and_never_to_what_processors_are_slow_with() -> None:
    frequency = Frequency(Shape((3,), (1,)), half_life=4.0)
    for _ in range(4):
        frequency.add(0, [1])
    assert frequency.of(0) == pytest.approx([1 / 6, 2 / 3, 1 / 6])
    for _ in range(40_000):
        frequency.add(0, [1])
    assert frequency.of(0) == pytest.approx([0, 1, 0])
    assert frequency.of(0).min() > np.finfo(float).tiny


def test_a_residence_is_slots_over_loads() -> None:
    """Little's law; the factors fall by it from call to call, the layer routed last comes a whole token later."""
    made = discount(20.0)
    factors = made.after(1)[:, 0]
    assert factors == pytest.approx(np.exp([-2 / 20, -3 / 20, -1 / 20]), rel=1e-4)
    assert made.token == pytest.approx(np.exp(-LAYERS / 20), rel=1e-4)


@pytest.mark.parametrize(("true", "share"), [(0.9, 1.0), (0.2, 0.0), (0.55, 0.5)])
def test_calibration_finds_how_far_a_prediction_is_to_be_believed(true: float, share: float) -> None:
    """Without the prediction .2 are expected, with it .9."""
    random, calibration = np.random.default_rng(0), Calibration(1)
    for _ in range(3000):
        calibration.learn([(0, np.full(8, 0.9))], np.full(8, 0.2), np.flatnonzero(random.random(8) < true))
    assert calibration.share[0] == pytest.approx(share, abs=0.1)


@pytest.mark.parametrize("guess_is_right", [True, False])
def test_the_better_of_gate_and_guess_is_believed(guess_is_right: bool) -> None:
    """One is always right, the other always wrong. The guess is asked for now and then, always only while it is believed."""
    random, world = np.random.default_rng(0), filled(2 * LAYERS)
    routes, asked = random.integers(0, EXPERTS, 200 * LAYERS + 1).tolist(), 0
    for call in range(200 * LAYERS):
        if call == 150 * LAYERS:
            before, asked = world.scheduler.prefetches.in_time, 0
        right, wrong = certain(routes[call + 1]), certain((routes[call + 1] + 1) % EXPERTS)
        gate, guess = (wrong, right) if guess_is_right else (right, wrong)
        after = (call + 1) % LAYERS
        last = Prediction(call % LAYERS, ((after, gate),), guess=guess if after else None)
        world.run_layer(call % LAYERS, {routes[call]}, FIRST, last)
        asked += world.scheduler.wants_guess()
        world.finish_all()
    assert world.scheduler.prefetches.in_time - before > 20
    assert asked == 50 * LAYERS if guess_is_right else abs(asked - 50 * LAYERS / JUDGED) < 1


def paced(calls_a_load: int) -> Pace:
    """Layers of 5 ms that wait for as long, loads of 40 ms."""
    pace = Pace()
    for call in range(1600):
        pace.layer_call(0.010 * call)
        pace.waited(0.005)
        if call % calls_a_load == 0:
            pace.load(0.040)
    return pace


def test_a_prefetch_must_be_likelier_the_less_it_can_hide() -> None:
    pace = paced(calls_a_load=400)
    assert pace.layer_seconds == pytest.approx(0.005)
    near, far, farther = pace.least_probability(np.array([1.0, 4.0, 400.0]))
    assert near > far > farther
    assert near == pytest.approx(EVICTED * 0.040 / (0.005 + EVICTED * 0.040))
    assert farther == pytest.approx(EVICTED / (1 + EVICTED))


def test_a_prefetch_must_be_likelier_the_busier_the_link_is() -> None:
    idle, half, busy = paced(calls_a_load=400), paced(calls_a_load=8), paced(calls_a_load=4)
    assert half.occupancy == pytest.approx(0.5, rel=0.05)
    assert busy.occupancy == pytest.approx(1.0, rel=0.01)
    distances = np.array([1.0, 400.0])
    least = [pace.least_probability(distances) for pace in (idle, half, busy)]
    assert least[0][0] < least[1][0] < least[2][0]
    lost = EVICTED + DELAYED
    assert least[2][1] == pytest.approx(lost / (1 + lost), rel=0.05)


def test_gates_that_cost_more_than_there_is_to_save_rest_longer_and_longer() -> None:
    worth = Worth()
    silent = []
    for _ in range(400):
        if worth.listening:
            worth.spent(0.001)
        worth.waited(0.002)  # whether they are asked or not
        worth.next_token()
        silent.append(not worth.listening)
    runs = "".join("s" if quiet else "l" for quiet in silent).split("l")
    assert [len(run) for run in runs if run][:3] == [REST, 2 * REST, 4 * REST]
    for _ in range(400):
        if worth.listening:
            worth.saved(0.01)
            worth.spent(0.001)
        worth.waited(0.002)
        worth.next_token()
    assert worth.listening
    assert BLOCK < REST


def test_gates_are_not_asked_again_while_there_is_nothing_to_wait_for() -> None:
    worth, asked = Worth(), []
    for token in range(2000):
        if worth.listening:
            worth.spent(0.001)
            asked.append(token)
        worth.waited(0.0 if token < 1000 else 0.010)
        worth.next_token()
    assert [token for token in asked if token < 1000] == list(range(BLOCK))
    assert len([token for token in asked if token >= 1000]) > BLOCK


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
        elif isinstance(action, Cancel) and action.key in scheduler.in_flight():  # otherwise it came too late
            actions += scheduler.dropped(action.key, now)


@pytest.mark.parametrize(("period", "half_life"), [(1, "32"), (24, "4")])
def test_the_frequency_that_fits_the_text_is_believed(period: int, half_life: str) -> None:
    """Experts drawn evenly from six, or from two of them that change every 24 tokens."""
    random, reuse = np.random.default_rng(0), ReuseEstimate(SHAPE, discount(8.0))
    for token in range(600):
        own = range(EXPERTS) if period == 1 else (2 * (token // period) % EXPERTS, 2 * (token // period) % EXPERTS + 1)
        for layer in range(LAYERS):
            chosen = [int(random.choice(own))]
            reuse.predicted(layer, random.random((3, EXPERTS)))  # noise: never better than any frequency
            reuse.routed(layer, chosen, judge=True)
    assert reuse.source == f"frequency with a half-life of {half_life} tokens"
