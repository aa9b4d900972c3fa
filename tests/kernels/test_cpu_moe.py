"""Whole experts against their definition in PyTorch, in float64."""

import itertools

import pytest
import torch
from matrices import ISAS, random_matrix, random_tokens, relative_error, running_on, running_with, weights_of
from torch.nn import functional

from foregate.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not())

FUNCTIONS = {
    "silu": functional.silu,
    "gelu_tanh": lambda v: functional.gelu(v, approximate="tanh"),
    "gelu": functional.gelu,
    "relu2": lambda v: functional.relu(v).square(),
    "relu": functional.relu,
}
HIDDEN, INNER = 136, 100  # both ragged


def defined(x: torch.Tensor, expert: cpu.Expert, activation: cpu.Activation) -> torch.Tensor:
    """What the expert computes, float64."""

    def linear(v: torch.Tensor, matrix: cpu.Matrix, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.linear(v, weights_of(matrix), None if bias is None else bias.double())

    h = linear(x.double(), expert.up, expert.up_bias)
    if activation.layout == "ungated":
        inner = FUNCTIONS[activation.function](h)
    else:
        gate, up = h.chunk(2, -1) if activation.layout == "concatenated" else (h[:, ::2], h[:, 1::2])
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
        if activation.alpha != 1:
            gate = gate * torch.sigmoid(activation.alpha * gate)
        else:
            gate = FUNCTIONS[activation.function](gate)
        inner = gate * (up + activation.up_offset)
    return linear(inner, expert.down, expert.down_bias)


def random_expert(kind, activation: cpu.Activation, bias: torch.dtype | None = None, seed: int = 0) -> cpu.Expert:
    """With first products of a size at which activations bend and clamps bite."""
    up_rows = INNER if activation.layout == "ungated" else 2 * INNER
    up, down = random_matrix(kind, up_rows, HIDDEN, seed), random_matrix(kind, HIDDEN, INNER, seed + 1)
    biases = (torch.randn(up_rows), torch.randn(HIDDEN)) if bias else (None, None)
    return cpu.Expert(up, down, *(None if b is None else b.to(bias) for b in biases))


def moderate_tokens(count: int) -> torch.Tensor:
    """Tokens like those after a norm."""
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(2)) / 4


ACTIVATIONS = [cpu.Activation(f, layout) for f, layout in itertools.product(FUNCTIONS, ("ungated", "concatenated"))]
ACTIVATIONS += [cpu.Activation("silu", "interleaved"), cpu.GPT_OSS, cpu.Activation("gelu", limit=0.5)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: f"{a.function}-{a.layout}-{a.limit}")
def test_activations(isa, activation):
    x = moderate_tokens(11)
    for kind in (torch.float32, 4):
        expert = random_expert(kind, activation)
        with running_on(isa):
            exact, rounded = (cpu.expert_mlp(x, expert, activation, exact) for exact in (True, False))
        expected = defined(x, expert, activation)
        assert relative_error(exact, expected) < 1e-5
        assert relative_error(rounded, expected) < 3e-2  # two products and, for relu2, the square of the first


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_biases(isa, dtype):
    x, expert = moderate_tokens(3), random_expert(3, cpu.GPT_OSS, bias=dtype)
    with running_on(isa):
        y = cpu.expert_mlp(x, expert, cpu.GPT_OSS, exact=True)
    assert relative_error(y, defined(x, expert, cpu.GPT_OSS)) < 1e-5


@pytest.mark.parametrize(("isa", "exact"), itertools.product(ISAS, (True, False)))
def test_many_experts_at_once(isa, exact):
    """Every place gets its expert's result, the same bits as that token gets alone, and other places are left alone."""
    g = torch.Generator().manual_seed(5)
    activation = cpu.Activation()
    kinds = (4, 3, 2, 8, torch.bfloat16)
    experts = [random_expert(kind, activation, seed=i) for i, kind in enumerate(kinds)]
    x = moderate_tokens(90)
    places = torch.randperm(400, generator=g)[:-7]
    counts = (1, 0, 290, 95, 7)  # one expert with more than a pass holds
    work = []
    for expert, rows in zip(experts, places.split(counts), strict=True):
        sources, weights = torch.randint(0, 90, rows.shape, generator=g), torch.rand(rows.shape, generator=g)
        work.append(cpu.Work(expert, sources, rows, weights))
    y = torch.full((400, HIDDEN), -1.0)
    with running_on(isa), running_with(3):
        cpu.moe(x, work, activation, y, exact)
        for item in work:
            for source, place, weight in zip(item.sources[:20], item.destinations, item.weights, strict=False):
                alone = cpu.expert_mlp(x[source : source + 1], item.expert, activation, exact)
                assert torch.equal(y[place], alone[0] * weight)
    untouched = torch.ones(400, dtype=torch.bool)
    untouched[places] = False
    assert (y[untouched] == -1).all()
    assert (y[places] != -1).all()


def test_exact_products_hold_for_all_tokens_of_a_long_pass():
    activation = cpu.Activation()
    expert, x = random_expert(4, activation), random_tokens(300, HIDDEN) / 20
    assert relative_error(cpu.expert_mlp(x, expert, activation, exact=True), defined(x, expert, activation)) < 1e-5


def test_weightless_and_empty_work():
    activation = cpu.Activation()
    expert, none = random_expert(4, activation), torch.zeros(0, dtype=torch.int64)
    y = torch.ones(2, HIDDEN)
    cpu.moe(moderate_tokens(1), [], activation, y)
    cpu.moe(moderate_tokens(1), [cpu.Work(expert, none, none)], activation, y)
    assert (y == 1).all()
