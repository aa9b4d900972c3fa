"""From a trace and a model's gates to the calls a scheduler would have seen, had the tokens been decoded one by one."""

import torch

from foregate.lookahead.gate import token_source
from foregate.lookahead.gates import LookaheadGates
from foregate.lookahead.metrics import chosen_mask
from foregate.lookahead.reuse import history_features
from foregate.lookahead.trace import Trace
from foregate.schedule import Call, Prediction


@torch.inference_mode()
def tape(trace: Trace, gates: LookaheadGates | None, rows: slice) -> list[Call]:
    """The calls of the tokens `rows` of a trace, in order; without gates there are no predictions.

    Gates know the rows' own past only: the first row is taken for the first of its sequence.
    """
    layers = len(trace.layers)
    chosen = [trace.chosen(layer)[rows].long() for layer in range(layers)]
    after = [_predictions(trace, gates, layer, rows) if gates else None for layer in range(layers)]
    before = _predictions(trace, gates, layers, rows) if gates else None
    calls = []
    for row in range(len(chosen[0])):
        for layer in range(layers):
            experts = sorted({e for e in chosen[layer][row].tolist() if 0 <= e < trace.layers[layer].num_experts})
            calls.append(
                Call(
                    layer,
                    tuple(experts),
                    before=before[row] if before and layer == 0 else None,
                    after=after[layer][row] if after[layer] else None,
                )
            )
    return calls


def _predictions(trace: Trace, gates: LookaheadGates, source: int, rows: slice) -> list[Prediction]:
    layers, gate = len(trace.layers), gates.gates[source]
    token = source == layers
    hidden = token_source(trace.embeddings[rows]) if token else trace.inputs(source)[rows].float()
    recent = torch.cat([_recent(trace, target, rows) for target in gates.targets[source]], 1)
    parts = [part.numpy() for part in gate.probabilities(gate(hidden, recent))]
    reuse = None if token else _reuse(trace, gates, source, rows, hidden)
    aims = [target.layer for target in gates.targets[source]]
    return [
        Prediction(
            layer=layers - 1 if token else source,
            ahead=tuple((aim, part[row]) for aim, part in zip(aims, parts, strict=True)),
            reuse=None if token else reuse[row],
            token=token,
        )
        for row in range(len(hidden))
    ]


def _recent(trace: Trace, target, rows: slice) -> torch.Tensor:
    scores = trace.scores(target.layer)[rows, : trace.layers[target.layer].num_experts].float()
    if target.next_token:
        return scores
    return torch.cat([torch.zeros_like(scores[:1]), scores[:-1]])


def _reuse(trace: Trace, gates: LookaheadGates, layer: int, rows: slice, hidden: torch.Tensor):
    experts = trace.layers[layer].num_experts
    used = chosen_mask(trace.chosen(layer)[rows].long(), experts)
    features = history_features(used, trace.scores(layer)[rows, :experts].float())
    return torch.sigmoid(gates.gates[layer].reuse(hidden, features)).numpy()
