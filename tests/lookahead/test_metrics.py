"""Metrics against figures worked out by hand."""

import pytest
import torch

from foregate.lookahead.metrics import (
    Ranking,
    Ratio,
    auc,
    calibration_bins,
    chosen_mask,
    covered_at,
    exact_set_rate,
    expected_calibration_error,
    precision_at,
    recall_at,
)

LOGITS = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0], [0.0, 9.0, 5.0, 7.0]])
CHOSEN = torch.tensor([[0, 1], [1, 3], [0, 2]])  # ranks 0 and 1; 2 and 0; 3 and 2
NONE = torch.tensor([[0, 4], [-1, 3], [-1, 4]])  # one expert, one, none


@pytest.mark.parametrize(("m", "found"), [(1, 2), (2, 3), (3, 5), (4, 6), (9, 6)])
def test_recall(m: int, found: int) -> None:
    assert recall_at(LOGITS, CHOSEN, m) == Ratio(found, 6)


def test_an_exact_set_has_all_chosen_experts_on_top() -> None:
    assert exact_set_rate(LOGITS, CHOSEN) == Ratio(1, 3)


def test_auc_counts_pairs_in_the_right_order() -> None:
    # first token: 4 of 4 pairs; second: expert 1 above 0 but not above 2, expert 3 above both; third: only 2 above none
    assert auc(LOGITS, CHOSEN) == Ratio(4 + 1 + 2 + 0 + 0, 12)


def test_equal_logits_count_half_and_the_lower_index_stands_first() -> None:
    flat = torch.zeros(1, 4)
    assert auc(flat, torch.tensor([[1, 2]])) == Ratio(2, 4)
    assert recall_at(flat, torch.tensor([[0, 3]]), 2) == Ratio(1, 2)
    assert exact_set_rate(flat, torch.tensor([[1, 0]])) == Ratio(1, 1)


def test_an_index_outside_the_experts_counts_nowhere() -> None:
    assert recall_at(LOGITS, NONE, 1) == Ratio(2, 2)
    assert exact_set_rate(LOGITS, NONE) == Ratio(2, 2)  # one expert wanted: the best alone must be it
    assert auc(LOGITS, NONE) == Ratio(6, 6)
    assert chosen_mask(NONE, 4).nonzero().tolist() == [[0, 0], [1, 3]]
    assert recall_at(LOGITS[2:], NONE[2:], 2).value is None


def test_nan_helps_nobody() -> None:
    logits = torch.full((1, 4), torch.nan)
    assert recall_at(logits, torch.tensor([[0, 2]]), 4).value == 0
    assert auc(logits, torch.tensor([[0, 2]])).value == 0
    assert recall_at(torch.tensor([[1.0, torch.nan, 0.0]]), torch.tensor([[0]]), 1).value == 0


def test_precision_and_coverage_at_a_threshold() -> None:
    probabilities = torch.tensor([[0.9, 0.8, 0.1, 0.0], [0.5, 0.7, 0.2, 0.3]])
    chosen = torch.tensor([[0, 2], [1, 4]])
    assert precision_at(probabilities, chosen, 0.8) == Ratio(1, 2)
    assert covered_at(probabilities, chosen, 0.8) == Ratio(1, 3)
    assert precision_at(probabilities, chosen, 0.5) == Ratio(2, 4)
    assert covered_at(probabilities, chosen, 0.5) == Ratio(2, 3)
    assert precision_at(probabilities, chosen, 0.95).value is None


def test_calibration() -> None:
    probabilities = torch.tensor([[0.1, 0.2, 0.6, 1.0]])
    bins = calibration_bins(probabilities, torch.tensor([[2, 9]]), bins=2)
    torch.testing.assert_close(bins, torch.tensor([[2, 2], [0.3, 1.6], [0, 1]], dtype=torch.float64), atol=1e-6, rtol=0)
    assert expected_calibration_error(bins) == pytest.approx((0.3 + 0.6) / 4, abs=1e-6)
    assert expected_calibration_error(torch.zeros(3, 2)) is None
    perfect = calibration_bins(torch.tensor([[1.0, 0.0]]), torch.tensor([[0]]), bins=10)
    assert expected_calibration_error(perfect) == 0


def test_parts_add_up_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, chosen = torch.randn(50, 16, generator=generator), torch.randint(0, 18, (50, 1), generator=generator)
    whole, parts = Ranking(logits, chosen), [Ranking(logits[:20], chosen[:20]), Ranking(logits[20:], chosen[20:])]
    for metric in (lambda r: r.recall(3), Ranking.exact_sets, Ranking.auc):
        assert metric(whole) == metric(parts[0]).plus(metric(parts[1]))


def test_recall_agrees_with_sorting() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(200, 32, generator=generator)
    chosen = torch.rand(200, 32, generator=generator).topk(4).indices
    best = logits.topk(6).indices
    found = sum(len(set(a) & set(b)) for a, b in zip(best.tolist(), chosen.tolist(), strict=True))
    assert recall_at(logits, chosen, 6) == Ratio(found, 800)
