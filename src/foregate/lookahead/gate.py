"""Lookahead gates: small heads beside a frozen model that say which experts the next layers will choose.

A gate reads one *source*: the router input of a MoE layer, or the embedding of the token that was just sampled. It
answers for the next `horizon` MoE layers, wrapping over the token boundary. Its logits are the target layers' own
routers behind the target layers' own norms, applied to the source (all that an untrained gate does), plus a learned
correction by a small MLP that also sees the target layers' most recent router scores, those of the token before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from foregate.lookahead.reuse import ReuseHead


@dataclass(frozen=True)
class GateLayer:
    """What gates must know of one MoE layer."""

    module: str  # module path of its experts
    num_experts: int
    top_k: int
    input_size: int  # of the router's input


@dataclass(frozen=True)
class RouterWeights:
    """A router as a linear map behind an RMS norm: logits = (x / rms(x) * gain) @ weight.T + bias."""

    weight: torch.Tensor | None  # float32 [num_experts, input_size]; None: the router is not linear
    bias: torch.Tensor | None  # float32 [num_experts]
    gain: torch.Tensor | None  # float32 [input_size]; None: no norm was found


class Target(NamedTuple):
    """What one horizon of a gate predicts."""

    layer: int  # MoE layer
    next_token: bool  # whether it lies beyond the token boundary


def targets(source: int, num_layers: int, horizon: int) -> tuple[Target, ...]:
    """The layers that the gate of `source` predicts, nearest first.

    Sources 0..num_layers-1 are MoE layers; source num_layers is the sampled token's embedding, whose targets are the
    first layers of the token itself. horizon is at most num_layers.
    """
    if source == num_layers:
        return tuple(Target(layer, False) for layer in range(horizon))
    ahead = range(source + 1, source + horizon + 1)
    return tuple(Target(layer % num_layers, layer >= num_layers) for layer in ahead)


class LookaheadGate(nn.Module):
    """The gate of one source: logits for all its targets in two products.

    logits = source @ base.T + bias + silu([source, recent] @ down.T + down_bias) @ up.T, where the outputs of all
    targets lie side by side and `recent` holds the targets' latest router scores. `width` 0 leaves the MLP out.
    """

    def __init__(self, input_size: int, sizes: Sequence[int], top_k: Sequence[int], width: int) -> None:
        super().__init__()
        self.reuse: ReuseHead | None = None  # of the source's own layer, once it is known
        self.sizes, self.top_k, self.width = tuple(sizes), tuple(top_k), width  # experts and k of each target
        outputs = sum(sizes)
        self.base = nn.Parameter(torch.zeros(outputs, input_size))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.down = nn.Parameter(torch.zeros(width, input_size + outputs))
        self.down_bias = nn.Parameter(torch.zeros(width))
        self.up = nn.Parameter(torch.zeros(outputs, width))
        self.scale = nn.Parameter(torch.ones(len(sizes)))  # of the probabilities, by target
        self.shift = nn.Parameter(torch.zeros(len(sizes)))

    def forward(self, source: torch.Tensor, recent: torch.Tensor) -> torch.Tensor:
        """source: float32 [tokens, input_size]; recent: float32 [tokens, outputs], the router scores that each target
        layer gave last, zeros before the first. Returns logits [tokens, outputs]."""
        logits = functional.linear(source, self.base, self.bias)
        if not self.width:
            return logits
        inner = functional.linear(torch.cat([source, recent], dim=-1), self.down, self.down_bias)
        return logits + functional.linear(functional.silu(inner), self.up)

    def split(self, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits of each target, nearest first: [tokens, num_experts] each."""
        return logits.split(self.sizes, dim=-1)

    def probabilities(self, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """For each target [tokens, num_experts]: how probable it is that the expert will be among the top k."""
        parts = zip(self.split(logits), self.top_k, self.scale, self.shift, strict=True)
        return tuple(torch.sigmoid(scale * (part - boundary(part, k)) + shift) for part, k, scale, shift in parts)

    @property
    def learned_parameters(self) -> int:
        """Parameters beside the routers' own weights."""
        return sum(p.numel() for name, p in self.named_parameters() if name != "base")

    @property
    def multiplications(self) -> int:
        """Multiply-adds a token."""
        return sum(p.numel() for p in self.parameters() if p.dim() == 2)


def token_source(embedding: torch.Tensor) -> torch.Tensor:
    """What the gate of the token source reads: an embedding divided by its root mean square; float32 [..., size]."""
    return functional.rms_norm(embedding.float(), embedding.shape[-1:])


def boundary(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Midway between the last logit that is chosen and the first that is not: [..., 1]."""
    if top_k >= logits.shape[-1]:
        return logits.min(dim=-1, keepdim=True).values
    top = logits.topk(top_k + 1, dim=-1).values
    return (top[..., -1:] + top[..., -2:-1]) / 2


def untrained_gate(
    layers: Sequence[GateLayer],
    routers: Sequence[RouterWeights],
    source: int,
    horizon: int,
    width: int,
    input_size: int,
) -> LookaheadGate:
    """The gate of `source` before alignment: the targets' routers behind the targets' norms.

    The source is x / rms(x) * gain of its own norm, so gain is divided out and the target's multiplied in; the token
    source has no gain. input_size: of the source. A router that is not a linear map of an input of this size starts from zeros.
    """
    aims = [target.layer for target in targets(source, len(layers), horizon)]
    gate = LookaheadGate(input_size, [layers[a].num_experts for a in aims], [layers[a].top_k for a in aims], width)
    own = routers[source].gain if source < len(layers) else torch.ones(input_size)
    with torch.no_grad():
        for base, bias, router in zip(
            gate.base.split(gate.sizes), gate.bias.split(gate.sizes), [routers[a] for a in aims], strict=True
        ):
            if router.weight is None or router.weight.shape[1] != input_size:
                continue
            base.copy_(router.weight * _norm_change(own, router.gain))
            if router.bias is not None:
                bias.copy_(router.bias)
    return gate


def _norm_change(own: torch.Tensor | None, target: torch.Tensor | None) -> torch.Tensor | float:
    """What turns the source behind its own norm into the source behind the target's."""
    if own is None or target is None or own.shape != target.shape or not (own != 0).all():
        return 1.0
    return target / own
