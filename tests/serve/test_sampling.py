"""Choosing tokens: greedy, by a seed, and with transformers' own filters as the reference."""

import pytest
import torch
from transformers import GenerationConfig

from foregate.serve.sampling import Sampler, Sampling

LOGITS = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 3


def drawn(sampling: Sampling, count: int = 300) -> list[int]:
    sampler = Sampler(sampling)
    return [sampler.choose(LOGITS, []) for _ in range(count)]


@pytest.mark.parametrize("temperature", [0, 1e-320, 1e-30, 1e-4, 1e-3])
def test_no_temperature_takes_the_likeliest(temperature: float) -> None:
    assert set(drawn(Sampling(temperature), 3)) == {int(LOGITS.argmax())}


def test_a_seed_repeats_and_none_does_not() -> None:
    assert drawn(Sampling(1.0, seed=5)) == drawn(Sampling(1.0, seed=5)) != drawn(Sampling(1.0, seed=6))
    assert drawn(Sampling(1.0)) != drawn(Sampling(1.0))


def test_frequencies_follow_temperature_and_top_p() -> None:
    probabilities = (LOGITS / 0.7).softmax(-1)
    order = probabilities.argsort(descending=True)
    before = probabilities[order].cumsum(0) - probabilities[order]
    kept = order[before < 0.8]  # the fewest likeliest that reach the share
    counts = torch.bincount(torch.tensor(drawn(Sampling(0.7, top_p=0.8, seed=1), 4000)), minlength=50)
    assert set(counts.nonzero().flatten().tolist()) == set(kept.tolist())
    expected = probabilities[kept] / probabilities[kept].sum()
    torch.testing.assert_close(counts[kept] / 4000, expected, atol=0.03, rtol=0)


def test_repetition_penalty_counts_prompt_and_reply() -> None:
    best = int(LOGITS.argmax())
    assert Sampler(Sampling(repetition_penalty=100.0)).choose(LOGITS, [best]) != best
    assert Sampler(Sampling(repetition_penalty=100.0)).choose(LOGITS, []) == best


@pytest.mark.parametrize(
    ("asked", "models", "used"), [(0.3, 0.6, 0.3), (None, 0.6, 0.6), (None, None, 1.0), (0, 0.6, 0)]
)
def test_a_request_comes_before_the_model_and_the_model_before_openai(asked, models, used) -> None:
    model = GenerationConfig(temperature=models)
    model.temperature = models
    assert Sampling.of_request(model, asked, None, None).temperature == used


def test_logits_are_left_alone() -> None:
    before = LOGITS.clone()
    drawn(Sampling(0.5, top_p=0.5, top_k=3, repetition_penalty=2.0, seed=1), 5)
    assert torch.equal(LOGITS, before)
