"""Lookahead gates made ready to run: all that a source says comes from one native call.

`LookaheadGates` computes the same the obvious way, and stands in where there is no native library. Matrices are rounded to
8 bits, which halves what a gate reads and moves probabilities by about a thousandth (docs/gates.md).
"""

import torch
from torch.nn import functional

from foregate.kernels import gate as native
from foregate.lookahead.gate import LookaheadGate
from foregate.lookahead.gates import Foreseen, LookaheadGates
from foregate.lookahead.reuse import HALF_LIVES, NEVER, WINDOWS, ReuseHead
from foregate.quantize.matrix import QuantizedMatrix
from foregate.quantize.rtn import Rtn

BITS = 8


class PackedGates:
    """All gates of a model, following one sequence: what `LookaheadGates` answers to `observe` and `foresee`.

    Raises ForegateError when a gate has weights that are not finite.
    """

    def __init__(self, gates: LookaheadGates) -> None:
        histories = [native.History(layer.num_experts, HALF_LIVES, NEVER) for layer in gates.header.layers]
        self._histories = histories
        self._gates = [
            _pack(gate, [histories[target.layer] for target in targets], own)
            for gate, targets, own in zip(gates.gates, gates.targets, [*histories, None], strict=True)
        ]

    def observe(self, layer: int, scores: torch.Tensor, chosen: torch.Tensor) -> None:
        """As `LookaheadGates.observe`."""
        self._histories[layer].observe(scores.float().contiguous(), chosen.long().contiguous())

    def foresee(self, source: int, hidden: torch.Tensor) -> Foreseen:
        """As `LookaheadGates.foresee`."""
        return Foreseen(*self._gates[source](hidden.contiguous()))


def _pack(gate: LookaheadGate, aims: list[native.History], own: native.History | None) -> native.Gate:
    """own: of the source's layer; None: the source is the sampled token's embedding (`gate.token_source`)."""
    rows, biases, reuse = [gate.base], [gate.bias], None
    if gate.reuse is not None and own is not None:
        rows.append(gate.reuse.down)
        biases.append(gate.reuse.down_bias)
        reuse = _pack_reuse(gate.reuse, own)
    return native.Gate(
        _rounded(torch.cat(rows)),
        torch.cat(biases).numpy(),
        aims,
        gate.top_k,
        gate.scale.numpy(),
        gate.shift.numpy(),
        _pack_mlp(gate) if gate.width else None,
        reuse,
        normalize=own is None,
    )


def _pack_mlp(gate: LookaheadGate) -> native.Mlp:
    source, scores = gate.down.split([gate.base.shape[1], len(gate.base)], dim=1)
    down = torch.cat([functional.pad(source, (0, -source.shape[1] % native.BLOCK)), scores], dim=1)
    return native.Mlp(_rounded(down), gate.down_bias.numpy(), _rounded(gate.up))


def _pack_reuse(head: ReuseHead, history: native.History) -> native.Reuse:
    shape = len(WINDOWS), head.num_experts
    return native.Reuse(history, head.up.view(*shape, -1).numpy(), head.bias.view(shape).numpy(), head.shared.numpy())


def _rounded(matrix: torch.Tensor) -> QuantizedMatrix:
    return Rtn().quantize(matrix, BITS, name="a lookahead gate")
