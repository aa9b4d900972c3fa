"""Packed gates against `LookaheadGates`, which computes the same the obvious way."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foregate.checkpoint.source import GATES_FILE
from foregate.checkpoint.store import Store
from foregate.errors import ForegateError
from foregate.kernels import cpu
from foregate.lookahead import packed
from foregate.lookahead.gate import GateLayer
from foregate.lookahead.gates import Foreseen, GatesHeader, LookaheadGates
from foregate.lookahead.packed import PackedGates
from foregate.lookahead.trace import Trace

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not())


def random_gates(
    layers: tuple[GateLayer, ...], horizon: int, width: int, seed: int, heads: bool = True
) -> LookaheadGates:
    header = GatesHeader(layers, 24, horizon, width, {})
    torch.manual_seed(seed)
    gates = [header.new_gate(source).requires_grad_(False) for source in range(len(layers) + 1)]
    for gate in gates:
        gate.reuse = gate.reuse if heads else None
        for parameter in gate.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return LookaheadGates(header, gates)


def exact(gates: LookaheadGates, monkeypatch: pytest.MonkeyPatch) -> PackedGates:
    """Packed without rounding their matrices, so that all the rest can be compared closely."""
    monkeypatch.setattr(packed, "_rounded", lambda matrix: matrix.contiguous())
    return PackedGates(gates)


def agree(found: Foreseen, wanted: Foreseen, tolerance: float = 1e-5) -> None:
    for one, other in zip(found.ahead, wanted.ahead, strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance)
    assert (found.reuse is None) == (wanted.reuse is None)
    if wanted.reuse is not None:
        np.testing.assert_allclose(found.reuse, wanted.reuse, atol=tolerance)


@settings(max_examples=40, deadline=None)
@given(
    experts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    top_k=st.integers(1, 4),
    inputs=st.sampled_from([3, 64, 100]),
    width=st.sampled_from([0, 1, 70]),
    calls=st.lists(st.sampled_from([1, 1, 2, 5]), min_size=1, max_size=4),
    heads=st.booleans(),
    seed=st.integers(0, 99),
)
def test_packed_gates_are_the_gates(
    experts: list[int], top_k: int, inputs: int, width: int, calls: list[int], heads: bool, seed: int
) -> None:
    layers = tuple(GateLayer(f"{n}", count, top_k, inputs) for n, count in enumerate(experts))
    gates = random_gates(layers, 1 + seed % len(layers), width, seed, heads)
    with pytest.MonkeyPatch.context() as monkeypatch:
        ready = exact(gates, monkeypatch)
    for tokens in calls:
        embeddings = torch.randn(tokens, 24)
        agree(ready.foresee(len(layers), embeddings), gates.foresee(len(layers), embeddings))
        for layer, count in enumerate(experts):
            hidden, scores = torch.randn(tokens, inputs), torch.randn(min(tokens, 3), count + 1)  # the newest tokens'
            chosen = torch.stack([torch.randperm(count + 2)[:top_k] - 1 for _ in range(tokens)])  # some are no experts
            for following in (ready, gates):
                following.observe(layer, scores, chosen)
            agree(ready.foresee(layer, hidden), gates.foresee(layer, hidden))


@pytest.mark.parametrize("isa", cpu.isas() if cpu.available() else [])
@pytest.mark.parametrize("threads", [1, 3])
def test_on_every_instruction_set_a_prompt_longer_than_a_pass(
    isa: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gates = random_gates(tuple(GateLayer(f"{n}", 40, 4, 640) for n in range(3)), 2, 256, 0)
    before = cpu.isa(), cpu.threads()
    cpu.use_isa(isa)
    cpu.set_threads(threads)
    try:
        hidden, ready = torch.randn(150, 640) * 0.1, exact(gates, monkeypatch)
        agree(ready.foresee(0, hidden), gates.foresee(0, hidden), 1e-4)
        monkeypatch.undo()
        rounded = PackedGates(gates).foresee(0, hidden[:1])
        agree(rounded, gates.foresee(0, hidden[:1]), 0.01)
        again = PackedGates(gates).foresee(0, hidden[:1])
        assert np.array_equal(rounded.ahead[0], again.ahead[0])
    finally:
        cpu.use_isa(before[0])
        cpu.set_threads(before[1])


def test_rounding_costs_no_recall(demo_store: Path, demo_trace: Path) -> None:
    """The demo model's gates over its own router inputs: probabilities move by a thousandth, the chosen ones stay."""
    gates = LookaheadGates.load(demo_store / GATES_FILE, Store(demo_store).layers)
    ready, trace, k = PackedGates(gates), Trace(demo_trace), 2
    moved, hits = [], np.zeros(2)
    for row in range(64):
        for layer in range(len(trace.layers)):
            hidden = trace.inputs(layer)[row : row + 1].float()
            answers = []
            for number, following in enumerate((gates, ready)):
                following.observe(layer, trace.scores(layer)[row : row + 1], trace.chosen(layer)[row : row + 1])
                answers.append(following.foresee(layer, hidden))
                for target, said in zip(gates.targets[layer], answers[-1].ahead, strict=True):
                    used = trace.chosen(target.layer)[row + target.next_token].tolist()
                    hits[number] += len(set(used) & set(np.argsort(-said)[:k].tolist()))
            moved += [abs(one - other).mean() for one, other in zip(answers[0].ahead, answers[1].ahead, strict=True)]
            np.testing.assert_allclose(answers[1].reuse, answers[0].reuse, atol=0.02)
    assert np.mean(moved) < 0.004
    assert abs(hits[1] / hits[0] - 1) < 0.004


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_harmless(value: float) -> None:
    gates = random_gates((GateLayer("a", 9, 2, 16),) * 2, 2, 4, 0)
    ready = PackedGates(gates)
    hidden = torch.randn(1, 16)
    hidden[0, 3] = value
    ready.observe(0, torch.full((1, 9), value), torch.tensor([[1, 5]]))
    assert [len(part) for part in ready.foresee(0, hidden).ahead] == [9, 9]
    gates.gates[1].base[0, 0] = value
    with pytest.raises(ForegateError, match="a lookahead gate has weights that are NaN or infinite"):
        PackedGates(gates)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda gates: gates.foresee(0, torch.zeros(1, 8)), "tokens of 16 numbers are needed"),
        (lambda gates: gates.foresee(0, torch.zeros(0, 16)), "tokens of 16 numbers are needed"),
        (lambda gates: gates.foresee(0, torch.zeros(1, 16).double()), "float64 where torch.float32"),
        (lambda gates: gates.observe(0, torch.zeros(1, 8), torch.zeros(1, 2)), "of 9 experts"),
        (lambda gates: gates.observe(0, torch.zeros(2, 9), torch.zeros(1, 2)), "of 9 experts"),
    ],
)
def test_calls_that_do_not_fit_are_refused(call: Callable[[PackedGates], object], match: str) -> None:
    gates = PackedGates(random_gates((GateLayer("a", 9, 2, 16),), 1, 4, 0))
    with pytest.raises(ValueError, match=match):
        call(gates)
