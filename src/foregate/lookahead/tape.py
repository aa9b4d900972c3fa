"""From a trace to the calls a scheduler would have seen, had the tokens been decoded one by one.

What is predicted around the calls differs by policy: nothing, what gates say and the next layer's own router beside them
(`tape`), or the guess of Mixtral-offloading (`next_router_tape`). The rows need not be consecutive: they are taken for one sequence, so gates
know the rows' own past only.
"""

from collections.abc import Sequence

import numpy as np
import torch

from foregate.lookahead.baselines import by_next_router
from foregate.lookahead.gate import LookaheadGate, Target, token_source
from foregate.lookahead.gates import LookaheadGates
from foregate.lookahead.metrics import chosen_mask
from foregate.lookahead.reuse import history_features
from foregate.lookahead.trace import Trace
from foregate.lookahead.untrained import untrained_of_trace
from foregate.schedule import Call, Prediction

Rows = slice | torch.Tensor  # of a trace: consecutive ones, or int64 [rows]
Predictions = Sequence[Prediction | None]  # by row


@torch.inference_mode()
def tape(trace: Trace, gates: LookaheadGates | None, rows: Rows) -> list[Call]:
    """The calls of the tokens `rows`, in order; without gates there are no predictions."""
    layers = range(len(trace.layers))
    if gates is None:
        return _calls(trace, rows, None, [None for _ in layers])
    own = untrained_of_trace(trace, horizon=1)
    before = _predictions(trace, gates, own, len(layers), rows)
    return _calls(trace, rows, before, [_predictions(trace, gates, own, layer, rows) for layer in layers])


@torch.inference_mode()
def next_router_tape(trace: Trace, rows: Rows) -> list[Call]:
    """The calls of the tokens `rows`, each layer guessing the next by that one's router on its own router input."""
    return _calls(trace, rows, None, [_guesses(trace, layer, rows) for layer in range(len(trace.layers))])


def _calls(trace: Trace, rows: Rows, before: Predictions | None, after: Sequence[Predictions | None]) -> list[Call]:
    """before: at the first layer; after: by layer."""
    chosen = [trace.chosen(layer)[rows].tolist() for layer in range(len(trace.layers))]
    return [
        Call(
            layer,
            tuple(sorted({expert for expert in chosen[layer][row] if 0 <= expert < info.num_experts})),
            before=before[row] if before and layer == 0 else None,
            after=said[row] if (said := after[layer]) else None,
        )
        for row in range(len(chosen[0]))
        for layer, info in enumerate(trace.layers)
    ]


def _guesses(trace: Trace, layer: int, rows: Rows) -> Predictions | None:
    """Scores as if they were probabilities: only their order counts. None where the next router cannot be applied."""
    if layer + 1 == len(trace.layers):
        return None
    logits = by_next_router(trace.inputs(layer)[rows].float(), trace.router(layer + 1))
    if logits is None:
        return None
    likely = torch.sigmoid(logits - logits.mean(1, keepdim=True)).numpy()
    return [Prediction(layer, ((layer + 1, row),)) for row in likely]


def _predictions(trace: Trace, gates: LookaheadGates, own: LookaheadGates, source: int, rows: Rows) -> Predictions:
    """own: gates of horizon 1 before alignment, for the guess."""
    layers, gate = len(trace.layers), gates.gates[source]
    token = source == layers
    hidden = token_source(trace.embeddings[rows]) if token else trace.inputs(source)[rows].float()
    recent = torch.cat([_recent(trace, target, rows) for target in gates.targets[source]], 1)
    parts = [part.numpy() for part in gate.probabilities(gate(hidden, recent))]
    reuse = None if gate.reuse is None else _reuse(trace, gates, source, rows, hidden)
    aims = [target.layer for target in gates.targets[source]]
    guess = None if source + 1 >= layers else _guess(own.gates[source], hidden)
    return [
        Prediction(
            layer=layers - 1 if token else source,
            ahead=tuple((aim, part[row]) for aim, part in zip(aims, parts, strict=True)),
            reuse=None if reuse is None else reuse[row],
            token=token,
            guess=None if guess is None else guess[row],
        )
        for row in range(len(hidden))
    ]


def _guess(gate: LookaheadGate, hidden: torch.Tensor) -> np.ndarray:
    return gate.probabilities(gate(hidden, hidden.new_zeros(len(hidden), gate.sizes[0])))[0].numpy()


def _recent(trace: Trace, target: Target, rows: Rows) -> torch.Tensor:
    scores = trace.scores(target.layer)[rows][:, : trace.layers[target.layer].num_experts].float()
    if target.next_token:
        return scores
    return torch.cat([torch.zeros_like(scores[:1]), scores[:-1]])


def _reuse(trace: Trace, gates: LookaheadGates, layer: int, rows: Rows, hidden: torch.Tensor) -> np.ndarray:
    experts = trace.layers[layer].num_experts
    used = chosen_mask(trace.chosen(layer)[rows].long(), experts)
    features = history_features(used, trace.scores(layer)[rows][:, :experts].float())
    return torch.sigmoid(gates.gates[layer].reuse(hidden, features)).numpy()
