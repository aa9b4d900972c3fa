"""Lookahead gates for an inflated model (`foregate.checkpoint.inflate`): the same probabilities from its wider inputs."""

from dataclasses import replace

import torch
from torch import nn

from foregate.checkpoint.widen import Axis, widen
from foregate.errors import ForegateError
from foregate.lookahead.gates import LookaheadGates


def inflate_gates(gates: LookaheadGates, small: int, wide: int) -> LookaheadGates:
    """The gates of the model whose hidden size was made `wide` from `small`.

    A router's input comes from a norm, whose gain carries the shares of the copies: what reads it is repeated as it is. An
    embedding comes as plain copies, so the gate that reads it carries the shares itself.
    Raises ForegateError when a gate reads something else than the hidden size.
    """
    header = gates.header
    sources = range(len(header.layers) + 1)
    if any(header.input_size(source) != small for source in sources):
        raise ForegateError(
            f"the lookahead gates do not read the model's hidden size {small}: train them again with foregate align, or "
            "remove their file"
        )
    header = replace(
        header, layers=tuple(replace(layer, input_size=wide) for layer in header.layers), embedding_size=wide
    )
    made = []
    for source in sources:
        axis = Axis(small, wide // small, shared=source == len(header.layers))
        gate = header.new_gate(source)
        _copy(gates.gates[source], gate, axis)
        made.append(gate.requires_grad_(False))
    return LookaheadGates(header, made)


@torch.no_grad()
def _copy(small: nn.Module, wide: nn.Module, axis: Axis) -> None:
    """Fill `wide` from `small`: a matrix with more columns reads the source with its first ones."""
    for name, target in wide.named_parameters():
        value = small.get_parameter(name)
        if value.shape != target.shape:
            read, rest = value.split([axis.unit, value.shape[1] - axis.unit], dim=1)
            value = torch.cat([widen(read, (None, axis)), rest], dim=1)
        target.copy_(value)
