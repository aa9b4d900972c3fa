"""How much could be foreseen at all: gates far too large to use, and given more than gates are given.

For ablations; the recall such a gate reaches is a lower bound of what its inputs say about the experts to come.
"""

from dataclasses import dataclass

import torch

from foregate.config import AlignConfig
from foregate.lookahead.fit import fit_gate, recall
from foregate.lookahead.gate import LookaheadGate
from foregate.lookahead.judge import untrained_of
from foregate.lookahead.samples import SourceSamples
from foregate.lookahead.trace import Trace

WIDTH = 512


@dataclass(frozen=True)
class InformationCeiling:
    """What a large gate reached on the evaluated trace, by target, nearest first."""

    inputs: str
    width: int
    recall: tuple[float, ...]  # NaN where nothing was chosen


class InformedSamples(SourceSamples):
    """Samples whose source also holds what each target's router was given last, the token before or this one."""

    def __init__(self, trace: Trace, source: int, horizon: int, max_tokens: int = 0) -> None:
        super().__init__(trace, source, horizon, max_tokens)
        self._before = [trace.inputs(target.layer) for target in self.targets]
        self.own_size = self.input_size
        self.input_size += sum(inputs.shape[1] for inputs in self._before)

    def source(self, rows: torch.Tensor) -> torch.Tensor:
        """float32 [rows, input_size]: the source, then the targets' last router inputs, zeros where a sequence begins."""
        parts = [super().source(rows)]
        for target, inputs in zip(self.targets, self._before, strict=True):
            if target.next_token:  # the layer has already run in this very row
                parts.append(inputs[rows].float())
            else:
                before = inputs[(rows - 1).clamp_min(0)].float()
                parts.append(before.masked_fill_(self._first[rows].unsqueeze(1), 0.0))
        return torch.cat(parts, dim=1)


def information_ceiling(
    training: Trace,
    judged: Trace,
    source: int,
    horizon: int,
    *,
    width: int = WIDTH,
    informed: bool = True,
    settings: AlignConfig | None = None,
) -> InformationCeiling:
    """Train a gate of `width` on one trace and judge it on another of the same model.

    informed: give it the targets' last router inputs too, beside the source and the targets' last scores.
    """
    settings = settings or AlignConfig()
    kind = InformedSamples if informed else SourceSamples
    learn, test = kind(training, source, horizon, settings.max_tokens), kind(judged, source, horizon)
    plain = untrained_of(training, source, horizon)
    gate = LookaheadGate(learn.input_size, plain.sizes, plain.top_k, width)
    with torch.no_grad():
        gate.base[:, : plain.base.shape[1]].copy_(plain.base)
        gate.bias.copy_(plain.bias)
    device = torch.device("cpu")
    fitted = fit_gate(learn, gate, settings, device)
    inputs = "source, scores" + (", router inputs" if informed else "")
    return InformationCeiling(inputs, width, recall(test, fitted.gate, test.rows, device))
