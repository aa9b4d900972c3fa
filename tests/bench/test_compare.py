"""Interleaving, medians and ratios, by hand; the stopwatch's machine, by hand."""

import pytest

from foregate.bench.compare import best_of, check_same_text, interleave, paired_ratio, summarise
from foregate.bench.host import ForeignLoad
from foregate.bench.live import Counts, Measurement, Script, Setting
from foregate.bench.steps import Step, StepWatch, machine_of
from foregate.errors import ForegateError
from foregate.schedule import Call, Prediction


def measured(speed: float, ids: tuple[int, ...] = (1, 2)) -> Measurement:
    counts = Counts(seconds=10 / speed, tokens=10, hits=30, misses=10, bytes_moved=500, stall_seconds=5 / speed)
    counts.prefetches_in_time, counts.prefetches_late, counts.prefetches_wasted = 2, 1, 1
    return Measurement(counts, (ids,), 0.02)


def test_settings_take_turns_and_every_repetition_begins_with_another() -> None:
    order = []

    def note(setting: Setting) -> Measurement:
        order.append(setting.name)
        return measured(1.0)

    runs = interleave([Setting(name, "lru", "25%") for name in "abc"], 4, note)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(found) for name, found in runs.items()} == {"a": 4, "b": 4, "c": 4}


def test_ratios_are_taken_within_a_repetition() -> None:
    """The machine slowed down by a factor of ten: medians of each alone would say 1, the pairs say 2."""
    fast, slow = [measured(20), measured(2)], [measured(10), measured(1)]
    assert paired_ratio(fast, slow) == pytest.approx(2)
    assert [run.tokens_per_second for run in best_of({"a": [measured(1), measured(5)], "b": [measured(3), measured(4)]}, "ab")] == [3, 5]  # fmt: skip


def test_summary() -> None:
    row = summarise("a", {"a": [measured(4), measured(8), measured(6)], "lru": [measured(2)] * 3}, ("lru", "absent"))
    assert row["tokens_per_second"] == {"median": 6, "least": 4, "most": 8}
    assert row["ratios"] == {"lru": pytest.approx(3)}
    assert (row["hit_rate"], row["prefetch_precision"], row["bytes_per_token"]) == (0.75, 0.75, 50)
    assert row["stall_share"] == pytest.approx(0.5)
    assert len(row["runs"]) == 3


def test_another_text_is_refused() -> None:
    for other in ([measured(1, (1, 3))], [measured(1), measured(1, (1, 3))]):
        with pytest.raises(ForegateError, match="b wrote another text than a"):
            check_same_text({"a": [measured(1)], "b": other})
    check_same_text({"a": [measured(1)], "b": [measured(9)]})


def test_impossible_wishes() -> None:
    for wish in ({"tokens": 0}, {"warm_up": -1}, {"prompts": ()}):
        with pytest.raises(ForegateError):
            Script(**wish)
    with pytest.raises(ForegateError, match="--repeats 0"):
        interleave([], 0, lambda setting: measured(1))


def test_own_work_is_no_foreign_load() -> None:
    share = ForeignLoad().share()
    assert share is None or 0 <= share <= 1


def test_the_machine_of_steps() -> None:
    """Two tokens of two layers after a prompt: 3 ms before the first layer, 1.5 of them after the token's prediction, 1 ms
    before the second, 2 ms inside."""
    watch, now = StepWatch(), 0.0
    predicted = Prediction(0, (), seconds=0.0005)
    for token in range(3):
        for layer in range(2):
            now += 0.003 if layer == 0 else 0.001
            kernels = [(1, 0.010)] if layer else [(2, 0.015), (1, 0.010)]
            took = sum(seconds for _, seconds in kernels) + 0.004 + 0.002 + 0.0005
            foreseen = now - 0.0015 if layer == 0 else None
            watch.steps.append(Step(layer, token > 0, now, foreseen, now + took, stall_seconds=0.004, kernels=kernels))
            watch.calls.append(Call(layer, (0,), after=predicted))
            now += took
    machine = machine_of(watch, record_bytes=1000, link_bandwidth=1e6, paced=False)
    assert machine.layer_seconds == pytest.approx(0.001 + 0.002)
    assert machine.token_seconds == pytest.approx(0.002)
    assert machine.start_seconds == pytest.approx(0.0005)
    assert (machine.call_seconds, machine.expert_seconds) == (pytest.approx(0.005), pytest.approx(0.005))
    assert machine.gate_seconds == pytest.approx(0.0005)
