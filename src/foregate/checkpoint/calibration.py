"""Calibration: what a trace tells about an expert's inputs, and how an expert is quantized with that.

The matrices are quantized in their order. The first (gate and up) counts errors by the expert's inputs; the down matrix
by what the already quantized first matrix makes of them. As in Li et al., "GPTAQ: Efficient Finetuning-Free Quantization
for Asymmetric Calibration", 2025, https://arxiv.org/abs/2504.02692, its target is the output of the original expert, so
that it makes up for what the first matrix lost.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from foregate.checkpoint.architecture import ExpertsModule
from foregate.checkpoint.store import CalibrationInfo, Weight
from foregate.errors import ForegateError
from foregate.kernels.reference import expert_inner
from foregate.lookahead.trace import Trace
from foregate.quantize.base import Quantizer

OWN_ROWS = 4096  # tokens at most that chose the expert
OTHER_ROWS = 1024  # of the layer's other tokens: all that a rarely chosen expert has to go by
OTHER_WEIGHT = 0.1  # of such a token's squared error
RIDGE = 0.1  # of the mean diagonal of H: holds the down matrix's target near the original
CHUNK = 512  # tokens whose inner activations are in memory at once


@dataclass(frozen=True)
class ExpertInputs:
    """Tokens to calibrate an expert with."""

    tokens: torch.Tensor  # float32 [samples, hidden]
    weights: torch.Tensor  # float32 [samples], of a token's squared error

    @property
    def samples(self) -> int:
        """How many tokens of weight 1 they are worth."""
        return round(float(self.weights.sum()))

    def chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(tokens [n, hidden], square roots of their weights [n, 1]), a few tokens at a time."""
        return zip(self.tokens.split(CHUNK), self.weights.sqrt().unsqueeze(1).split(CHUNK), strict=True)


class Calibration:
    """The inputs that a trace holds for every expert of a model; they are read from disk as they are asked for."""

    def __init__(self, trace: Trace, layers: Sequence[ExpertsModule]) -> None:
        """Raises ForegateError when the trace was recorded from another model."""
        trace.check_matches(layers)
        for recorded, layer in zip(trace.layers, layers, strict=True):
            size = layer.params[_first_matrix(layer.params)][1]
            if recorded.expert_input_size != size:
                raise ForegateError(
                    f"{trace.path} is the trace of another model, whose experts read {recorded.expert_input_size} values "
                    f"instead of {size}: record one of this model with foregate trace"
                )
        self._trace = trace
        self._layers = {layer.name: index for index, layer in enumerate(layers)}

    @property
    def info(self) -> CalibrationInfo:
        """What a store's manifest says about the trace. Its digest differs for any other texts, model or cut."""
        digest = hashlib.sha256(self._trace.header.to_json().encode()).hexdigest()
        texts = tuple((text.name, text.sha256) for text in self._trace.texts)
        return CalibrationInfo(self._trace.num_tokens, digest, texts)

    def inputs(self, layer: ExpertsModule, expert: int) -> ExpertInputs:
        """Tokens that chose the expert, with a few others; evenly spaced over the trace."""
        index = self._layers[layer.name]
        chose = (self._trace.chosen(index) == expert).any(1)
        own = _evenly(chose.nonzero().squeeze(1), OWN_ROWS)
        others = _evenly(chose.logical_not().nonzero().squeeze(1), OTHER_ROWS)
        rows = torch.cat([own, others])
        weights = torch.cat([torch.ones(len(own)), torch.full((len(others),), OTHER_WEIGHT)])
        return ExpertInputs(self._trace.expert_inputs(index)[rows].float(), weights)


def quantize_expert(
    params: dict[str, torch.Tensor],
    experts: nn.Module,
    inputs: ExpertInputs,
    quantizer: Quantizer,
    bits: int,
    where: str,
) -> dict[str, Weight]:
    """An expert's parameters with its matrices quantized for `inputs`; the same bytes however many threads there are.

    params: the expert's, matrices [out, in], biases [out]. experts: the family's experts module, which may be without
    weights (on the meta device). Raises ForegateError, naming `where`, for weights that are not finite.
    """
    with _one_thread(), torch.inference_mode():
        first = _first_matrix(params)
        given = {name: param.float() for name, param in params.items()}
        hessian = _hessian(inputs)
        quantized = quantizer.quantize(
            given[first], bits, hessian=hessian, samples=inputs.samples, name=f"{first} of {where}"
        )
        hessian, gap = _inner_moments(given, {**given, first: quantized.dequantize()}, experts, inputs)
        target = given["down_proj"] + _make_up(given["down_proj"], hessian, gap)
        down = quantizer.quantize(target, bits, hessian=hessian, samples=inputs.samples, name=f"down_proj of {where}")
    made: dict[str, Weight] = {first: quantized, "down_proj": down}
    return {name: made.get(name, param) for name, param in params.items()}


def _hessian(inputs: ExpertInputs) -> torch.Tensor:
    """X^T X of the weighted inputs X: float32 [hidden, hidden]."""
    hessian = torch.zeros(inputs.tokens.shape[1], inputs.tokens.shape[1])
    for tokens, scale in inputs.chunks():
        scaled = tokens * scale
        hessian.addmm_(scaled.T, scaled)
    return hessian


def _inner_moments(
    original: dict[str, torch.Tensor],
    quantized: dict[str, torch.Tensor],
    experts: nn.Module,
    inputs: ExpertInputs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Z^T Z and Z^T (Y - Z) for the inner activations Y of the original expert and Z of the quantized one."""
    size = original["down_proj"].shape[1]
    hessian, gap = torch.zeros(size, size), torch.zeros(size, size)
    for tokens, scale in inputs.chunks():
        wanted, found = (
            expert_inner(tokens, params, experts, functional.linear) * scale for params in (original, quantized)
        )
        hessian.addmm_(found.T, found)
        gap.addmm_(found.T, wanted - found)
    return hessian, gap


def _make_up(weight: torch.Tensor, hessian: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
    """The change of `weight` [out, in] that brings W Z nearest to W Y, by ridge regression; zero where it has no solution."""
    damped = hessian + RIDGE * hessian.diagonal().mean() * torch.eye(len(hessian))
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:  # no input reaches the matrix
        return torch.zeros_like(weight)
    return torch.cholesky_solve(gap @ weight.T, factor).T


def _evenly(rows: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` of the rows, evenly spaced."""
    return rows if len(rows) <= most else rows[torch.arange(most) * len(rows) // most]


def _first_matrix(params: Mapping[str, Any]) -> str:
    """Name of the matrix that reads the expert's input."""
    return "gate_up_proj" if "gate_up_proj" in params else "up_proj"


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let PyTorch use one thread: how it divides sums among several changes their rounding."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
