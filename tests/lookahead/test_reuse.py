"""Reuse heads: histories against a slow loop, labels by hand, and that a head learns what frequency cannot know."""

import torch

from foregate.lookahead.metrics import chosen_mask
from foregate.lookahead.reuse import (
    HALF_LIVES,
    NEVER,
    WINDOWS,
    UseHistory,
    fit_reuse_head,
    history_features,
    reused,
)


def test_history_of_many_rows_is_the_history_token_by_token() -> None:
    torch.manual_seed(0)
    used, scores = torch.rand(600, 5) < 0.2, torch.randn(600, 5)
    together, history = history_features(used, scores), UseHistory(5)
    for row in range(600):
        history.observe(used[row])
        assert torch.allclose(together[row], history.features(scores[row]), atol=1e-4), row


def test_history_by_hand() -> None:
    history = UseHistory(2)
    history.observe(torch.tensor([True, False]))
    history.observe(torch.tensor([False, False]))
    expected = torch.tensor([0.5 ** (1 / life) for life in HALF_LIVES])
    assert torch.allclose(history.decayed[:, 0], expected)
    assert history.age.tolist() == [1.0, NEVER + 2]


def test_reused_by_hand() -> None:
    used = torch.zeros(20, 1, dtype=torch.bool)
    used[[4, 5]] = True
    again = reused(used)[:, :, 0]
    assert WINDOWS == (1, 4, 16)
    assert again[:, 0].nonzero().flatten().tolist() == [3, 4]
    assert again[:, 1].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    assert again[:, 2].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


def test_head_learns_what_the_input_announces() -> None:
    """The input's sign says which half of the experts the next tokens use; past use says nothing."""
    torch.manual_seed(0)
    tokens, experts = 4096, 8
    phase = torch.randint(0, 2, (tokens // 4,)).repeat_interleave(4)  # of the four tokens that follow
    inputs = torch.randn(tokens, 6)
    inputs[:, 0] = phase * 2.0 - 1
    chosen = (torch.randint(0, 4, (tokens, 1)) + 4 * phase.roll(1)[:, None]).to(torch.int16)
    head = fit_reuse_head(inputs, torch.zeros(tokens, experts), chosen, width=8, seed=0)
    used = chosen_mask(chosen.long(), experts)
    with torch.no_grad():
        next_token = head(inputs, history_features(used, torch.zeros(tokens, experts)))[:, 0]
    in_phase = next_token.view(tokens, 2, 4).mean(2)
    right = in_phase.gather(1, phase[:, None]) > in_phase.gather(1, 1 - phase[:, None])
    assert right.float().mean() > 0.99


def test_fitting_is_reproducible() -> None:
    torch.manual_seed(0)
    inputs, scores, chosen = torch.randn(600, 6), torch.randn(600, 4), torch.randint(0, 4, (600, 2))
    first, second = (fit_reuse_head(inputs, scores, chosen, width=8, seed=3) for _ in range(2))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
