"""What a gate is taught and how sure it is, on made-up scores."""

import pytest
import torch

from foregate.lookahead.fit import expected_calibration_error, logistic_fit
from foregate.lookahead.metrics import chosen_mask
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


def test_an_index_outside_is_no_expert() -> None:
    assert chosen_mask(torch.tensor([[0, 3], [2, -1]]), 3).tolist() == [[True, False, False], [False, False, True]]


@pytest.mark.parametrize(("scale", "shift"), [(0.7, -0.4), (3.0, 0.8)])
def test_calibration_finds_scale_and_shift(scale: float, shift: float) -> None:
    torch.manual_seed(0)
    margins = torch.randn(50_000, dtype=torch.float64) * 2
    wanted = torch.bernoulli(torch.sigmoid(scale * margins + shift))
    found = logistic_fit(margins, wanted)
    assert found == pytest.approx((scale, shift), abs=0.08)
    probabilities = torch.sigmoid(found[0] * margins + found[1])
    assert expected_calibration_error(probabilities, wanted) < 0.01
    assert expected_calibration_error(1 - probabilities, wanted) > 0.2


def test_calibration_stays_finite() -> None:
    margins = torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=torch.float64)
    for wanted in (margins > 0, margins < 0, margins > -9):
        assert all(abs(value) < 100 for value in logistic_fit(margins, wanted.double()))
    assert logistic_fit(torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))[1] > 0
