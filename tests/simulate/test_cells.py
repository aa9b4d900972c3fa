"""Cells of a sweep on a real, short trace of the demo model; machines that are not here."""

from pathlib import Path

import pytest
import torch

from foregate.checkpoint.source import GATES_FILE
from foregate.config import CardConfig
from foregate.errors import ForegateError
from foregate.lookahead.gates import LookaheadGates
from foregate.lookahead.tape import next_router_tape, tape
from foregate.lookahead.trace import Trace
from foregate.lookahead.untrained import untrained_of_trace
from foregate.schedule import Shape
from foregate.simulate import Machine
from foregate.simulate.cells import REFERENCES, simulate_cells
from foregate.simulate.presets import preset
from foregate.simulate.workload import Workload

MACHINE = Machine(10_000_000, 1e9, layer_seconds=0.001, expert_seconds=0.002)
ROWS = slice(0, 48)


@pytest.fixture(scope="module")
def workload(demo_store: Path, demo_trace: Path) -> Workload:
    trace = Trace(demo_trace)
    return Workload(trace, LookaheadGates.load(demo_store / GATES_FILE, trace.layers), ROWS)


def test_a_sweep_of_all_policies(workload: Workload) -> None:
    policies = ["demand", "mixtral-offloading-code", "lookahead", *REFERENCES]
    cells = list(simulate_cells(workload, policies, ["25%", "50%"], [1e9, 4e9], MACHINE, warm_up=8))
    assert [(cell[0].memory, cell[0].link_bandwidth) for cell in cells] == [
        ("25%", 1e9), ("50%", 1e9), ("25%", 4e9), ("50%", 4e9)
    ]  # fmt: skip
    for cell in cells:
        speeds = {result.policy: result.tokens_per_second for result in cell}
        known = {policy: speed for policy, speed in speeds.items() if policy != "clairvoyant-determined"}
        assert max(known, key=lambda policy: known[policy]) == "clairvoyant"
        assert min(speeds, key=lambda policy: speeds[policy]) in ("demand", "mixtral-offloading-code")
        for result in cell:
            assert result.ratios == {name: result.tokens_per_second / speeds[name] for name in REFERENCES}
            assert 0 <= result.stall_share < 1
            assert 0 < result.link_share <= 1 + 1e-9


def test_the_next_router_guesses_from_this_ones_input(workload: Workload) -> None:
    trace = workload.trace
    layers = len(trace.layers)
    for place, call in enumerate(next_router_tape(trace, ROWS)[: 3 * layers]):
        if call.layer + 1 == layers:
            assert call.after is None
            continue
        ((target, likely),) = call.after.ahead
        expected = trace.router(call.layer + 1).weight @ trace.inputs(call.layer)[place // layers].float()
        assert target == call.layer + 1
        assert likely.argsort().tolist() == expected.argsort().tolist()


def test_rows_may_be_any_and_calls_are_the_traces(workload: Workload) -> None:
    rows = torch.tensor([5, 90, 17])
    calls = tape(workload.trace, workload.gates, rows)
    assert len(calls) == 3 * len(workload.trace.layers)
    for place, call in enumerate(calls):
        row = rows[place // len(workload.trace.layers)]
        assert set(call.experts) == set(workload.trace.chosen(call.layer)[row].tolist())
        assert (call.before is not None) == (call.layer == 0)


def test_untrained_gates_have_everything_but_reuse(workload: Workload) -> None:
    calls = tape(workload.trace, untrained_of_trace(workload.trace, 2), ROWS)
    assert all(call.after.reuse is None and len(call.after.ahead) == 2 for call in calls)


def test_the_next_layers_own_router_is_heard_beside_the_gates(workload: Workload) -> None:
    own = untrained_of_trace(workload.trace, 1)
    for place, call in enumerate(tape(workload.trace, workload.gates, ROWS)[: 3 * len(own.header.layers)]):
        if call.layer + 1 == len(own.header.layers):
            assert call.after.guess is None
            continue
        hidden = workload.trace.inputs(call.layer)[place // len(own.header.layers)].float()[None]
        assert call.after.guess == pytest.approx(own.predict(call.layer, hidden)[0][1].numpy(), abs=1e-5)


def test_what_cannot_be_simulated(workload: Workload) -> None:
    def first(policy: str, memory: str = "25%") -> None:
        next(simulate_cells(workload, [policy], [memory], [1e9], MACHINE))

    with pytest.raises(ForegateError, match="unknown policy best"):
        first("best")
    with pytest.raises(ForegateError, match="the smallest that works is --memory"):
        first("lru", "1%")
    with pytest.raises(ForegateError, match="needs gates"):
        Workload(workload.trace, None, ROWS).calls("lookahead")


def test_a_machine_that_is_not_here() -> None:
    traced, card = Shape((32,) * 8, (4,) * 8), preset("qwen3-30b-a3b-4bit-12gb-pcie4")
    machine = card.machine(traced)
    weights = 3 * 2048 * 768
    assert machine.record_bytes / 2 == pytest.approx(weights * 4.25 / 8, rel=0.01)  # two real experts in one
    assert machine.load_seconds == pytest.approx(machine.record_bytes / 24e9 + 20e-6)
    reached = CardConfig.reached * 360e9
    assert machine.expert_seconds == pytest.approx(machine.record_bytes / reached)
    attention = 2 * 2048 * (2 * 32 + 2 * 4) * 128  # in bfloat16, whatever the store has
    assert machine.layer_seconds == pytest.approx(attention / reached + CardConfig.layer_seconds)
    assert machine.gate_seconds == CardConfig.gate_seconds > 0
    assert card.time_scale(traced) == 6
    free = 10.5 * 2**30 - 48 * attention - 2 * 2 * 151936 * 2048
    assert card.share_that_fits == pytest.approx(free / (6144 * machine.record_bytes / 2))
    assert "projected" in card.describe(traced)
    with pytest.raises(ForegateError, match="with a top-k that divides it"):
        preset("mixtral-8x7b-2bit-24gb-pcie5").machine(traced)
    with pytest.raises(ForegateError, match="unknown machine laptop"):
        preset("laptop")
