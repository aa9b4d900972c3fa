"""What a gate is taught and how sure it is, on made-up scores."""

import pytest
import torch

from foregate.lookahead.fit import logistic_fit, training_loss
from foregate.lookahead.gate import LookaheadGate, Target
from foregate.lookahead.metrics import calibration_bins, expected_calibration_error
from foregate.lookahead.teacher import Teacher


def agreement(logits: torch.Tensor, chosen: torch.Tensor) -> float:
    best = logits.topk(chosen.shape[1]).indices.sort().values
    return float((best == chosen.sort().values).all(1).float().mean())


def test_scores_by_which_the_choice_was_made_are_taught_as_they_are() -> None:
    scores = torch.randn(500, 8)
    chosen = scores.topk(2).indices
    teacher = Teacher.fit(scores, chosen)
    assert teacher.chooses_by_scores
    assert torch.equal(teacher(scores, chosen), scores)


def test_a_bias_per_expert_is_found() -> None:
    torch.manual_seed(0)
    scores, bias = torch.randn(2000, 8), torch.randn(8)
    chosen = (scores + bias).topk(2).indices
    teacher = Teacher.fit(scores, chosen)
    assert agreement(scores, chosen) < 0.5 < 0.95 < agreement(scores + teacher.offset, chosen)
    assert agreement(teacher(scores, chosen), chosen) == 1


def test_any_choice_is_taught_and_the_rest_of_the_scores_kept() -> None:
    torch.manual_seed(0)
    scores = torch.randn(300, 8)
    chosen = torch.where(torch.arange(300)[:, None] % 3 == 0, torch.tensor([[1, 2]]), scores.topk(2).indices)
    chosen[7] = torch.tensor([8, -1])  # no expert at all
    teacher = Teacher.fit(scores, chosen)
    rows = torch.arange(300) != 7
    taught = teacher(scores, chosen)
    assert agreement(taught[rows], chosen[rows]) == 1
    assert taught.isfinite().all()
    assert torch.equal(taught[7], scores[7] + teacher.offset)


def test_what_follows_an_open_token_is_ranked_by_how_often_it_is_chosen() -> None:
    """Expert 0 is chosen narrowly most of the time, expert 1 by far now and then: the mean of the scores would take 1."""
    seldom = torch.arange(10)[:, None] < 4
    wanted = torch.where(seldom, torch.tensor([0.0, 10.0, 0.0]), torch.tensor([1.0, 0.0, 0.0]))
    chosen, gate = wanted.topk(1).indices, LookaheadGate(3, (3,), (1,), 0)
    best = {}
    for next_token in (False, True):
        logits = torch.zeros(3, requires_grad=True)
        optimizer = torch.optim.Adam([logits], 0.1)
        for _ in range(300):
            optimizer.zero_grad()
            training_loss(logits.expand(10, 3), wanted, [chosen], [Target(1, next_token)], gate).backward()
            optimizer.step()
        best[next_token] = int(logits.argmax())
    assert best == {False: 1, True: 0}


def test_a_hard_target_takes_nothing_from_an_easy_one() -> None:
    torch.manual_seed(0)
    targets, chosen = [Target(1, False), Target(2, False)], [torch.zeros(64, 2, dtype=torch.int64)] * 2
    gate, wanted, error = LookaheadGate(3, (8, 8), (2, 2), 0), torch.randn(64, 16), torch.randn(64, 16)
    gradients = []
    for far_error in (1.0, 100.0):
        logits = wanted + error * torch.tensor([0.1, far_error]).repeat_interleave(8)
        logits.requires_grad_(True)
        training_loss(logits, wanted, chosen, targets, gate).backward()
        gradients.append([float(part.norm()) for part in gate.split(logits.grad)])
    (near, far), (near_beside_harder, far_when_harder) = gradients
    assert near_beside_harder == pytest.approx(near, rel=1e-5)
    assert near > 5 * far > 50 * far_when_harder
    exact = wanted.clone().requires_grad_(True)
    training_loss(exact, wanted, chosen, targets, gate).backward()
    assert exact.grad.isfinite().all()


@pytest.mark.parametrize(("scale", "shift"), [(0.7, -0.4), (3.0, 0.8), (20.0, -1.0)])
def test_calibration_finds_scale_and_shift(scale: float, shift: float) -> None:
    torch.manual_seed(0)
    margins = torch.randn(50_000, dtype=torch.float64) * 2
    wanted = torch.bernoulli(torch.sigmoid(scale * margins + shift))
    found = logistic_fit(margins, wanted)
    assert found == pytest.approx((scale, shift), rel=0.1, abs=0.08)
    probabilities = torch.sigmoid(found[0] * margins + found[1])
    chosen = torch.where(wanted > 0, 0, -1)[:, None]  # one expert, taken or not
    errors = [
        expected_calibration_error(calibration_bins(p[:, None], chosen, 15)) for p in (probabilities, 1 - probabilities)
    ]
    assert errors[0] < 0.01
    assert errors[1] > 0.2


def test_calibration_stays_finite() -> None:
    margins = torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=torch.float64)
    for wanted in (margins > 0, margins < 0, margins > -9):
        assert all(abs(value) < 100 for value in logistic_fit(margins, wanted.double()))
    assert logistic_fit(torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))[1] > 0
