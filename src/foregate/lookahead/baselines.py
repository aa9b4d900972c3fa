"""What gates are compared with: guesses that need no training, and a probe that is given what gates must guess.

All give logits [rows, num_experts]; only their order counts.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from foregate.lookahead.fit import STATISTICS_ROWS, evenly
from foregate.lookahead.gate import RouterWeights
from foregate.lookahead.metrics import chosen_mask, is_expert
from foregate.lookahead.teacher import Teacher
from foregate.lookahead.trace import Trace

CHUNK_ROWS = 4096
PROBE_ROWS = 16384  # or four times the input's values: a router's scores are nearly linear in its input
RIDGE = 1e-4  # of the mean variance of an input


@dataclass(frozen=True)
class Probe:
    """A linear map from a layer's true router input: what is left when a gate need not guess the input."""

    weight: torch.Tensor  # float32 [num_experts, input_size]
    bias: torch.Tensor

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """inputs: float32 [rows, input_size]."""
        return functional.linear(inputs, self.weight, self.bias)


def frequencies(trace: Trace, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """For each MoE layer the share of tokens that chose each expert: float32 [num_experts]. rows: int64."""
    shares = []
    for index, layer in enumerate(trace.layers):
        counts, chosen = torch.zeros(layer.num_experts), trace.chosen(index)
        for part in rows.split(CHUNK_ROWS):
            experts = chosen[part].long()
            experts = experts[is_expert(experts, layer.num_experts)]
            counts += torch.bincount(experts, minlength=layer.num_experts)
        shares.append(counts / len(rows))
    return tuple(shares)


def by_previous_token(chosen_before: torch.Tensor, frequency: torch.Tensor) -> torch.Tensor:
    """The experts that the layer used last, then the others by frequency. chosen_before: int64 [rows, k]."""
    return frequency + 2.0 * chosen_mask(chosen_before, len(frequency))  # a frequency is at most 1


def by_next_router(source: torch.Tensor, router: RouterWeights) -> torch.Tensor | None:
    """The target's router on the source as it is, its norm left alone; None where that cannot be computed."""
    if router.weight is None or router.weight.shape[1] != source.shape[1]:
        return None
    return functional.linear(source, router.weight, router.bias)


def fit_probe(trace: Trace, layer: int, rows: torch.Tensor) -> Probe:
    """Least squares with a small ridge from the layer's router inputs to what a gate would learn, over `rows`."""
    size, experts = trace.layers[layer].input_size, trace.layers[layer].num_experts
    inputs, scores, chosen = trace.inputs(layer), trace.scores(layer)[:, :experts], trace.chosen(layer)
    rows = evenly(rows, max(PROBE_ROWS, 4 * size))
    some = evenly(rows, STATISTICS_ROWS)
    teacher = Teacher.fit(scores[some].float(), chosen[some].long())
    squares, products = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, experts, dtype=torch.float64)
    sums, score_sums = torch.zeros(size, dtype=torch.float64), torch.zeros(experts, dtype=torch.float64)
    for part in rows.split(CHUNK_ROWS):
        x, y = inputs[part].float(), teacher(scores[part].float(), chosen[part].long())
        squares += x.T @ x
        products += x.T @ y
        sums += x.sum(0)
        score_sums += y.sum(0)
    mean, score_mean = sums / len(rows), score_sums / len(rows)
    covariance = squares / len(rows) - mean.outer(mean)
    covariance.diagonal().add_(RIDGE * covariance.diagonal().mean().clamp_min(1e-12))
    weight = torch.linalg.solve(covariance, products / len(rows) - mean.outer(score_mean))
    return Probe(weight.T.float(), (score_mean - mean @ weight).float())
