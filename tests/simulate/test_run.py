"""The virtual clock against sums done by hand, and against what no machine can beat."""

from collections.abc import Collection
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foregate.schedule import (
    BOUNDS,
    POLICIES,
    Action,
    Call,
    ExpertKey,
    Load,
    Prediction,
    Scheduler,
    Shape,
    make_scheduler,
)
from foregate.simulate import Machine, Outcome, run
from foregate.simulate.link import VirtualLink

SHAPE = Shape((4, 4), (1, 1))
MACHINE = Machine(
    record_bytes=1_000_000,
    link_bandwidth=1e9,
    chunk_bytes=250_000,
    readers=1,
    layer_seconds=0.0001,
    expert_seconds=0.0002,
)  # a load takes 1 ms, a chunk 0.25 ms, a layer with its expert 0.3 ms


def lru(calls: list[Call], machine: Machine = MACHINE, warm_up: int = 0, slots: int = 8) -> Outcome:
    return run(calls, make_scheduler("lru", slots, SHAPE), machine, warm_up)


def token(first: int, second: int) -> list[Call]:
    return [Call(0, (first,)), Call(1, (second,))]


class Scripted(Scheduler):
    """Fetches one record ahead, after the first call; evicts nothing."""

    ahead: ExpertKey | None = None

    def victim(self) -> None:
        return None

    def computed(self, keys: Collection[ExpertKey], now: float = 0.0) -> list[Action]:
        self.wanted = self.ahead
        self.ahead = None
        return super().computed(keys, now)

    def next_prefetch(self, now: float) -> ExpertKey | None:
        wanted, self.wanted = getattr(self, "wanted", None), None
        return wanted


class Told(Scripted):
    """Fetches one record ahead, when something is predicted."""

    def computed(self, keys: Collection[ExpertKey], now: float = 0.0) -> list[Action]:
        return Scheduler.computed(self, keys, now)

    def wants_predictions(self) -> bool:
        return True

    def predicted(self, prediction: Prediction, now: float = 0.0) -> list[Action]:
        self.wanted = self.ahead
        return self._go_on(now)


def fetching(key: ExpertKey) -> Scripted:
    scheduler = Scripted(8, SHAPE)
    scheduler.ahead = key
    return scheduler


def test_misses_wait_for_the_whole_load() -> None:
    outcome = lru(token(0, 1))
    assert (outcome.hits, outcome.misses, outcome.loads, outcome.tokens) == (0, 2, 2, 1)
    assert outcome.seconds == pytest.approx(2 * (0.0001 + 0.0010 + 0.0002))
    assert outcome.stall_seconds == pytest.approx(0.0020) == outcome.link_seconds


def test_hits_take_compute_alone_and_warm_up_is_not_counted() -> None:
    outcome = lru(token(0, 1) * 3, warm_up=1)
    assert (outcome.hits, outcome.misses, outcome.loads, outcome.tokens) == (4, 0, 0, 2)
    assert outcome.seconds == pytest.approx(4 * 0.0003) == outcome.compute_seconds
    assert outcome.stall_seconds == outcome.link_seconds == 0
    assert outcome.tokens_per_second == pytest.approx(2 / 0.0012)


def test_times_of_tokens_calls_gates_and_records_are_added() -> None:
    machine = Machine(1_000_000, 1e8, link_latency=0.004, layer_seconds=0.001, call_seconds=0.5, token_seconds=0.25)
    assert lru(token(0, 1), machine).seconds == pytest.approx(0.25 + 2 * (0.001 + 0.014 + 0.5))


def test_what_follows_the_tokens_prediction_hides_a_prefetch() -> None:
    """The record asked for first is foreseen when the token is known, 0.6 ms and a layer's time before."""
    calls = [Call(0, (0,)), Call(1, (0,)), replace(Call(0, (1,)), before=Prediction(1, (), token=True))]
    seconds = []
    for start in (0.0, 0.0006):
        scheduler = Told(8, SHAPE)
        scheduler.ahead = (0, 1)
        seconds.append(run(calls, scheduler, replace(MACHINE, token_seconds=0.0008, start_seconds=start), 1).seconds)
    assert seconds[0] == pytest.approx(0.0008 + 0.0010 + 0.0002)  # of the load, 0.1 ms is hidden
    assert seconds[1] == pytest.approx(0.0002 + 0.0010 + 0.0002)


def test_resident_experts_are_computed_while_the_missing_ones_arrive() -> None:
    calls = [Call(0, (0,)), Call(1, (0,)), Call(0, (0, 1))]
    outcome = lru(calls, warm_up=1)
    assert (outcome.hits, outcome.misses) == (1, 1)
    assert outcome.seconds == pytest.approx(0.0001 + 0.0010 + 0.0002)  # the resident one within the load's time
    assert outcome.stall_seconds == pytest.approx(0.0010 - 0.0002)


def test_a_prefetch_works_beside_compute() -> None:
    """Begun when the first call ends, it has a layer's time before its record is asked for."""
    outcome = run(token(0, 1), fetching((1, 1)), MACHINE)
    assert outcome.seconds == pytest.approx((0.0001 + 0.0010 + 0.0002) + 0.0010 + 0.0002)
    assert (outcome.prefetches.started, outcome.prefetches.late, outcome.misses) == (1, 1, 2)


def test_a_demand_load_waits_for_the_chunk_at_work_and_the_prefetch_goes_on() -> None:
    """Asked for 0.1 ms into a prefetch of the wrong record: 0.15 ms of its chunk are left."""
    outcome = run(token(0, 2), fetching((1, 1)), MACHINE)
    assert outcome.seconds == pytest.approx((0.0001 + 0.0010 + 0.0002) + 0.0001 + 0.00015 + 0.0010 + 0.0002)
    assert (outcome.prefetches.started, outcome.prefetches.late, outcome.loads) == (1, 0, 3)
    assert outcome.link_seconds == pytest.approx(
        0.0010 + 0.00025 + 0.0010 + 0.0002
    )  # the prefetch goes on beside compute


def test_a_paced_link_can_be_overtaken_every_half_millisecond() -> None:
    slow = replace(MACHINE, link_bandwidth=1e8)
    assert slow.chunk_seconds == pytest.approx(0.0005)
    assert replace(slow, paced=False).chunk_seconds == pytest.approx(0.0025)  # a disk is read in whole chunks
    crawling = replace(MACHINE, link_bandwidth=1.0)
    assert crawling.chunk_seconds == pytest.approx(4096)  # a block of the disk, as the engine's


def test_every_reader_holds_a_chunk_that_cannot_be_overtaken() -> None:
    two = Machine(**(vars(MACHINE) | {"readers": 2}))
    outcome = run(token(0, 2), fetching((1, 1)), two)
    assert outcome.seconds == pytest.approx((0.0001 + 0.0010 + 0.0002) + 0.0001 + 0.00015 + 0.00025 + 0.0010 + 0.0002)


def test_predictions_cost_time_only_where_they_are_listened_to() -> None:
    machine = Machine(1_000_000, 1e9, gate_seconds=0.1)
    said = Prediction(0, ((1, [0.9, 0.05, 0.0, 0.0]),))
    calls = [Call(0, (0,), after=said), Call(1, (0,))]
    assert run(calls, make_scheduler("lru", 8, SHAPE), machine).seconds == pytest.approx(0.002)
    guessed = run(calls, make_scheduler("mixtral-offloading", 8, SHAPE), machine)
    assert guessed.compute_seconds == pytest.approx(0.1)
    assert guessed.prefetches.started == 1  # the link was not idle again before the next layer


def test_a_record_copied_back_takes_the_link_twice() -> None:
    link = VirtualLink(MACHINE, lambda transfer: ends.append((transfer.load.key, link.now)))
    ends: list[tuple[ExpertKey, float]] = []
    link.submit(Load((0, 0), 0, back=(0, 1)))
    link.advance(1.0)
    assert ends == [((0, 0), pytest.approx(0.0020))]


def test_the_link_serves_demand_first_and_drops_what_is_cancelled() -> None:
    ends: list[tuple[ExpertKey, bool, float]] = []
    link = VirtualLink(MACHINE, lambda transfer: ends.append((transfer.load.key, transfer.dropped, link.now)))
    for expert in range(3):
        link.submit(Load((0, expert), expert, demand=False))
    link.advance(0.0001)
    link.hurry((0, 2))
    link.cancel((0, 1))
    link.cancel((0, 0))  # its first chunk is at work
    link.advance(1.0)
    assert ends == [
        ((0, 1), True, 0.0001),
        ((0, 0), True, pytest.approx(0.00025)),
        ((0, 2), False, pytest.approx(0.00125)),
    ]
    assert link.busy_seconds == pytest.approx(0.00125)


def test_a_busy_link_counts_only_the_time_that_has_passed() -> None:
    link = VirtualLink(MACHINE, lambda transfer: None)
    link.submit(Load((0, 0), 0))
    link.advance(0.0004)
    assert link.busy_seconds == pytest.approx(0.0004)


@pytest.mark.parametrize("policy", sorted(POLICIES | BOUNDS))
@given(
    routes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12),
    slots=st.integers(1, 8),
    link_bandwidth=st.sampled_from([2e7, 1e8, 1e9]),
    readers=st.integers(1, 3),
)
def test_what_no_machine_can_beat(
    policy: str, routes: list[tuple[int, int]], slots: int, link_bandwidth: float, readers: int
) -> None:
    machine = Machine(1_000_000, link_bandwidth, readers=readers, layer_seconds=0.001, expert_seconds=0.002)
    calls = [call for route in routes for call in token(*route)]
    scheduler = make_scheduler(policy, slots, SHAPE, [(call.layer, call.experts) for call in calls])
    outcome = run(calls, scheduler, machine)
    scheduler.check_integrity()
    assert outcome.hits + outcome.misses == len(calls)
    assert outcome.seconds == pytest.approx(outcome.compute_seconds + outcome.stall_seconds)
    assert outcome.compute_seconds == pytest.approx(len(calls) * 0.003)
    assert outcome.link_seconds <= outcome.seconds + 1e-9
    assert outcome.seconds >= len({(call.layer, call.experts) for call in calls}) * machine.load_seconds - 1e-9
    if policy in ("lru", "demand"):  # nothing is dropped, nothing comes too late
        assert outcome.link_seconds == pytest.approx(outcome.loads * machine.load_seconds)
