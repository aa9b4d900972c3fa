"""One gate: its targets, what it computes untrained, its probabilities."""

import pytest
import torch
from torch.nn import functional

from foregate.lookahead.gate import (
    GateLayer,
    LookaheadGate,
    RouterWeights,
    Target,
    boundary,
    targets,
    token_source,
    untrained_gate,
)

LAYERS = tuple(GateLayer(f"layers.{n}", 6, 2, 16) for n in range(4))


def random_routers() -> list[RouterWeights]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return [RouterWeights(draw(6, 16), draw(6), 0.5 + torch.rand(16, generator=generator)) for _ in LAYERS]


def test_targets_wrap_over_the_token_boundary() -> None:
    assert targets(0, 4, 3) == (Target(1, False), Target(2, False), Target(3, False))
    assert targets(2, 4, 3) == (Target(3, False), Target(0, True), Target(1, True))
    assert targets(3, 4, 1) == (Target(0, True),)
    assert targets(4, 4, 2) == (Target(0, False), Target(1, False))  # the sampled token


def test_untrained_it_is_the_targets_routers_behind_their_norms() -> None:
    routers, hidden = random_routers(), torch.randn(5, 16)
    bare = functional.rms_norm(hidden, (16,))
    for source in range(4):
        gate = untrained_gate(LAYERS, routers, source, 3, 8, 16)
        parts = gate.split(gate(bare * routers[source].gain, torch.randn(5, 18)))
        for part, target in zip(parts, targets(source, 4, 3), strict=True):
            aim = routers[target.layer]
            torch.testing.assert_close(part, bare * aim.gain @ aim.weight.T + aim.bias, rtol=1e-4, atol=1e-4)
    gate = untrained_gate(LAYERS, routers, 4, 3, 8, 16)
    part = gate.split(gate(token_source(hidden), torch.zeros(5, 18)))[1]
    torch.testing.assert_close(
        part, bare * routers[1].gain @ routers[1].weight.T + routers[1].bias, rtol=1e-4, atol=1e-4
    )


def test_routers_it_cannot_use_start_from_zeros() -> None:
    routers = random_routers()
    routers[1] = RouterWeights(None, None, None)
    gate = untrained_gate(LAYERS, routers, 0, 2, 8, 16)
    first, second = gate.base.split(gate.sizes)
    assert not first.any()
    assert second.any()
    assert not untrained_gate(LAYERS, routers, 4, 2, 8, 24).base.any()  # embeddings of another size


@pytest.mark.parametrize("width", [0, 8])
def test_probabilities_say_half_at_the_boundary(width: int) -> None:
    gate = LookaheadGate(16, [6, 4], [2, 4], width)
    logits = torch.randn(7, 10)
    first, second = gate.probabilities(logits)
    assert first.shape == (7, 6)
    assert torch.equal((first > 0.5).sum(1), torch.full((7,), 2))
    assert (second >= 0.5).all()  # all four are always chosen
    assert torch.equal(first.topk(2).indices, logits[:, :6].topk(2).indices)
    assert gate(torch.randn(7, 16), torch.randn(7, 10)).shape == (7, 10)


def test_the_boundary_lies_between_the_last_in_and_the_first_out() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0, 8.0]])
    assert boundary(logits, 2).tolist() == [[3.0]]
    assert boundary(logits, 4).tolist() == [[1.0]]


def test_sizes() -> None:
    gate = LookaheadGate(16, [6, 6, 6], [2, 2, 2], 8)
    assert gate.learned_parameters == 18 + 8 * (16 + 18) + 8 + 18 * 8 + 6
    assert gate.multiplications == 16 * 18 + 8 * (16 + 18) + 18 * 8
