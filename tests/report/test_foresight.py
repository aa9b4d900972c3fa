"""Scores of predictions against the metrics that gates are judged by, and against a recount of a recorded run."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foregate.lookahead.metrics import precision_at, recall_at
from foregate.report.foresight import SURE, Aim, Foresight, Score, by_horizon, compare
from foregate.schedule import Prediction


@given(st.integers(1, 40), st.integers(2, 20), st.integers(0, 10_000))
def test_compare_against_the_metrics_of_gates(calls: int, experts: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    predicted = rng.permuted(np.tile(np.arange(experts) / experts, (calls, 1)), axis=1)  # no two alike in a row
    chosen = [rng.choice(experts, rng.integers(1, experts + 1), replace=False).tolist() for _ in range(calls)]
    score = compare(predicted, chosen)
    rows = [(torch.tensor(row)[None], torch.tensor(own)[None]) for row, own in zip(predicted, chosen, strict=True)]
    recalls = [recall_at(logits, own, own.shape[1]) for logits, own in rows]
    precisions = [precision_at(logits, own, SURE) for logits, own in rows]
    assert (score.calls, score.chosen) == (calls, sum(map(len, chosen)))
    assert score.found == sum(ratio.part for ratio in recalls)
    assert (score.right, score.sure) == tuple(sum(values) for values in zip(*precisions, strict=True))


def test_an_expert_as_likely_as_the_kth_is_found() -> None:
    assert compare(np.array([[0.9, 0.4, 0.4, 0.4, 0.1]]), [[0, 3]]).found == 2
    assert compare(np.array([[0.9, 0.4, 0.4, 0.4, 0.1]]), [[4, 3]]).found == 1


@pytest.mark.parametrize("policy", ["lookahead", "mixtral-offloading", "lru"])
def test_scores_against_a_recount(run: Callable[[str], Any], policy: str) -> None:
    """Each call with what was predicted for it, from the calls that the engine recorded."""
    calls, layers = run(policy).calls, 12
    expected: dict[Aim, np.ndarray] = {}
    scores: dict[Aim, Score] = {}
    for call in calls:
        if call.before:
            expected |= {Aim(target, "token", target + 1): given for target, given in call.before.ahead}
        for aim in [aim for aim in expected if aim.layer == call.layer]:
            likely = expected.pop(aim)
            best = sorted(range(len(likely)), key=lambda e: -likely[e])[: len(call.experts)]
            sure = [e for e in range(len(likely)) if likely[e] >= 0.5]
            if call.tokens == 1:
                score = scores.setdefault(aim, Score())
                score.calls += 1
                score.chosen += len(call.experts)
                score.found += len(set(best) & set(call.experts))
                score.sure += len(sure)
                score.right += len(set(sure) & set(call.experts))
        if call.after and call.tokens == 1:
            for target, given_ in call.after.ahead:
                expected[Aim(target, "layer", (target - call.layer - 1) % layers + 1)] = given_
    found = run(policy).recorder.foresight.scores()
    assert found == scores
    assert {aim.horizon for aim in found} == {"lookahead": {1, 2, 3}, "mixtral-offloading": {1}, "lru": set()}[policy]
    for (source, horizon), total in by_horizon(found).items():
        assert total.chosen == sum(s.chosen for a, s in scores.items() if (a.source, a.horizon) == (source, horizon))


def test_what_a_prompt_chooses_is_not_counted() -> None:
    foresight, everything = Foresight(2), np.ones(4)
    foresight.routed(0, [0, 1, 2, 3], tokens=5)
    foresight.predicted(Prediction(0, ((1, everything),)))
    foresight.routed(1, [0, 1, 2, 3], tokens=5)
    foresight.predicted(Prediction(1, ((0, everything),)))
    foresight.routed(0, [1, 2], tokens=1)  # foreseen from the prompt
    assert not foresight.scores()
    foresight.predicted(Prediction(0, ((1, everything),)))
    foresight.routed(1, [0], tokens=1)
    assert foresight.scores() == {Aim(1, "layer", 1): Score(calls=1, chosen=1, found=1, sure=4, right=1)}
    assert foresight.scores()[Aim(1, "layer", 1)].precision == 0.25
