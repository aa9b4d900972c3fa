"""What a trace teaches the gate of one source: which rows have all its targets, and what stands in them.

A row is a token. The source's input at row t goes with each target's scores and choice: at row t for a target in the same
token, at row t + 1 of the same sequence for one beyond the token boundary.
"""

import torch

from foregate.errors import ForegateError
from foregate.lookahead.gate import GateLayer, RouterWeights, targets, token_source
from foregate.lookahead.trace import Trace

VALIDATION_SHARE = 0.1  # of each text's sequences, its last ones


class SourceSamples:
    """The rows of `trace` that source `source` can learn from or be judged by.

    Nothing but row numbers is in memory: values are read from the mapped trace when they are asked for. max_tokens: use
    only the first sequences, so many tokens at most; 0 uses all. Raises ForegateError when the horizon does not suit
    the trace or no row has all targets.
    """

    def __init__(self, trace: Trace, source: int, horizon: int, max_tokens: int = 0) -> None:
        count = len(trace.layers)
        if not 1 <= horizon <= count:
            raise ForegateError(f"--horizon {horizon}: 1 to {count} are possible, the number of the model's MoE layers")
        self.trace, self.source_index = trace, source
        self.targets = targets(source, count, horizon)
        self.sizes = tuple(trace.layers[target.layer].num_experts for target in self.targets)
        self.top_k = tuple(trace.layers[target.layer].top_k for target in self.targets)
        self.input_size = trace.header.embedding_size if source == count else trace.layers[source].input_size
        self._inputs = trace.embeddings if source == count else trace.inputs(source)
        self._scores = [trace.scores(target.layer) for target in self.targets]
        self._chosen = [trace.chosen(target.layer) for target in self.targets]
        self._read_sequences(max_tokens)
        if not len(self.rows):
            raise ForegateError(f"{trace.path} is too short for gates: record longer sequences with foregate trace")

    def source(self, rows: torch.Tensor) -> torch.Tensor:
        """What the gate reads: float32 [rows, input_size]."""
        values = self._inputs[rows].float()
        return token_source(values) if self.source_index == len(self.trace.layers) else values

    def recent(self, rows: torch.Tensor) -> torch.Tensor:
        """The scores that each target's layer gave last before it runs again: float32 [rows, outputs], targets side by
        side, zeros where a sequence begins."""
        parts = []
        for target, size, scores in zip(self.targets, self.sizes, self._scores, strict=True):
            if target.next_token:  # the layer has already run in this very row
                parts.append(scores[rows, :size].float())
            else:
                before = scores[(rows - 1).clamp_min(0), :size].float()
                parts.append(before.masked_fill_(self._first[rows].unsqueeze(1), 0.0))
        return torch.cat(parts, dim=1)

    def recent_chosen(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The experts that each target's layer used last before it runs again: int64 [rows, top_k], -1 (no expert)
        where a sequence begins."""
        parts = []
        for target, chosen in zip(self.targets, self._chosen, strict=True):
            if target.next_token:
                parts.append(chosen[rows].long())
            else:
                before = chosen[(rows - 1).clamp_min(0)].long()
                parts.append(before.masked_fill_(self._first[rows].unsqueeze(1), -1))
        return tuple(parts)

    def scores(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The router scores to be foreseen, by target: float32 [rows, num_experts]."""
        return tuple(
            scores[rows + target.next_token, :size].float()
            for target, size, scores in zip(self.targets, self.sizes, self._scores, strict=True)
        )

    def chosen(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The experts to be foreseen, by target: int64 [rows, top_k]; an index outside the experts is none."""
        return tuple(
            chosen[rows + target.next_token].long() for target, chosen in zip(self.targets, self._chosen, strict=True)
        )

    def text_of(self, rows: torch.Tensor) -> torch.Tensor:
        """The text of each row, as an index among the trace's texts: int64 [rows]."""
        return self._texts[self._sequence_of(rows)]

    def _sequence_of(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.searchsorted(self._starts, rows, right=True) - 1

    def _read_sequences(self, max_tokens: int) -> None:
        """Find the usable rows, all (`rows`) and divided: `validation` has the last sequences of each text."""
        sequences = self.trace.sequences
        if max_tokens:
            sequences = tuple(s for s in sequences if s.start + s.length <= max_tokens)
        starts = torch.tensor([s.start for s in sequences], dtype=torch.int64)
        lengths = torch.tensor([s.length for s in sequences], dtype=torch.int64)
        self._starts, self._texts = starts, torch.tensor([s.text for s in sequences], dtype=torch.int64)
        tokens = int(lengths.sum())
        self._first = torch.zeros(tokens, dtype=torch.bool)
        self._first[starts] = True
        usable = torch.ones(tokens, dtype=torch.bool)
        if any(target.next_token for target in self.targets):
            usable[starts + lengths - 1] = False
        self.rows = usable.nonzero().squeeze(1)
        held_out = _last_of_each_text(self._texts)[self._sequence_of(self.rows)]
        self.training, self.validation = self.rows[~held_out], self.rows[held_out]


def _last_of_each_text(texts: torch.Tensor) -> torch.Tensor:
    """Which sequences are held out for validation: bool [sequences]. A text of one sequence gives none."""
    held_out = torch.zeros(len(texts), dtype=torch.bool)
    for text in texts.unique().tolist():
        own = (texts == text).nonzero().squeeze(1)
        if len(own) > 1:
            held_out[own[-max(1, round(len(own) * VALIDATION_SHARE)) :]] = True
    return held_out


def gate_layers(trace: Trace) -> tuple[GateLayer, ...]:
    """What gates must know of the traced model's MoE layers."""
    return tuple(GateLayer(n.module, n.num_experts, n.top_k, n.input_size) for n in trace.layers)


def router_weights(trace: Trace) -> tuple[RouterWeights, ...]:
    """What the trace knows of every router, for `untrained_gate`."""
    return tuple(trace.router(index) for index in range(len(trace.layers)))


def hits(logits: torch.Tensor, chosen: torch.Tensor, top_k: int) -> tuple[int, int]:
    """(chosen experts among the top_k logits, chosen experts) over all rows; recall is their ratio.

    logits [rows, num_experts]; chosen int64 [rows, k], where an index outside the experts is none and not counted.
    """
    real = (chosen >= 0) & (chosen < logits.shape[1])
    best = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, logits.topk(top_k, dim=1).indices, True)
    found = best.gather(1, chosen.clamp(0, logits.shape[1] - 1)) & real
    return int(found.sum()), int(real.sum())
