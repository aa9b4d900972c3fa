"""A compact Mixture-of-Experts transformer for training, exact twin of two transformers classes.

One implementation covers ``MixtralForCausalLM`` and ``Qwen3MoeForCausalLM``:
they differ only in the norms that Qwen3 applies to queries and keys.  Weights
map one to one (:meth:`MoeModel.to_transformers`), and the logits agree.

What makes it fast: tokens sorted by expert, so that every expert is two large
products; keys and values shared by the heads of a group; attention in blocks
of queries that skip the keys after them; bf16 products with fp32 residuals.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

# Smaller blocks skip more of the future, but every block is compiled code of its own.
QUERY_BLOCK, MAX_BLOCKS = 64, 8
ROPE_THETA = 10_000.0
NORM_EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """Dimensions of one demo model."""

    layers: int
    hidden: int
    experts: int
    active: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    query_key_norm: bool
    vocab: int = 3072

    def transformers_config(self, max_positions: int, **tokens: int) -> PreTrainedConfig:
        """The configuration of the transformers class with the same computation."""
        common = dict(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            num_experts_per_tok=self.active,
            max_position_embeddings=max_positions,
            rms_norm_eps=NORM_EPS,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            tie_word_embeddings=True,
            **tokens,
        )
        if not self.query_key_norm:
            return MixtralConfig(num_local_experts=self.experts, intermediate_size=self.intermediate, **common)
        return Qwen3MoeConfig(
            num_experts=self.experts,
            moe_intermediate_size=self.intermediate,
            intermediate_size=self.intermediate * self.active,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            **common,
        )


SHAPES = {
    "mixtral": Shape(12, 256, 8, 2, 128, heads=8, kv_heads=2, head_dim=32, query_key_norm=False),
    "qwen3-moe": Shape(8, 192, 32, 4, 64, heads=6, kv_heads=2, head_dim=32, query_key_norm=True),
}


class Layer(nn.Module):
    """The weights of one decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden, inner = shape.hidden, shape.intermediate
        query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        residual_std = 0.02 / math.sqrt(2 * shape.layers)
        self.input_norm = nn.Parameter(torch.ones(hidden))
        self.q = matrix(query, hidden)
        self.k = matrix(key, hidden)
        self.v = matrix(key, hidden)
        self.o = matrix(hidden, query, std=residual_std)
        if shape.query_key_norm:
            self.q_norm = nn.Parameter(torch.ones(shape.head_dim))
            self.k_norm = nn.Parameter(torch.ones(shape.head_dim))
        self.expert_norm = nn.Parameter(torch.ones(hidden))
        self.router = matrix(shape.experts, hidden)
        self.gate_up = matrix(shape.experts, 2 * inner, hidden)
        self.down = matrix(shape.experts, hidden, inner, std=residual_std)


def matrix(*size: int, std: float = 0.02) -> nn.Parameter:
    """A normally distributed weight."""
    return nn.Parameter(torch.randn(*size) * std)


class MoeModel(nn.Module):
    """The training model; :meth:`loss` computes everything one training step needs."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = matrix(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.final_norm = nn.Parameter(torch.ones(shape.hidden))
        self.mixer = mix_tokens

    def compile(self) -> None:
        """Fuse the elementwise work of attention, norms and routing; all layers share the code."""
        self.mixer = torch.compile(mix_tokens, dynamic=False)

    def forward(self, ids: Tensor, weights: dict[str, Tensor] | None = None) -> tuple[Tensor, list[Routing]]:
        """Hidden states before the output matrix, and every layer's routing.

        ``weights`` replaces the parameters, by name: the trainer passes bf16 copies.
        """
        weights = weights or dict(self.named_parameters())
        cos, sin = rotary_tables(ids.shape[1], self.shape.head_dim, ids.device)
        x = F.embedding(ids, weights["embedding"]).float()
        routings = []
        for number in range(self.shape.layers):
            prefix = f"layers.{number}."
            layer = {name[len(prefix) :]: w for name, w in weights.items() if name.startswith(prefix)}
            x, normed, logits, routing = self.mixer(x, layer, cos, sin, self.shape)
            mixed = Experts.apply(normed, layer["gate_up"], layer["down"], routing[0], routing[1])
            x = x + mixed.view_as(x)
            routings.append(Routing(logits, *routing))
        return rms_norm(x, weights["final_norm"]).to(weights["embedding"].dtype), routings

    def logits(self, ids: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        """Next-token logits."""
        hidden, _ = self(ids, weights)
        return F.linear(hidden, (weights or dict(self.named_parameters()))["embedding"])

    def to_transformers(self, config: PreTrainedConfig) -> PreTrainedModel:
        """The same weights in the transformers class, fp32."""
        model = (Qwen3MoeForCausalLM if self.shape.query_key_norm else MixtralForCausalLM)(config)
        names = {
            "input_norm": "input_layernorm.weight",
            "expert_norm": "post_attention_layernorm.weight",
            "router": "mlp.gate.weight",
            "gate_up": "mlp.experts.gate_up_proj",
            "down": "mlp.experts.down_proj",
            "q_norm": "self_attn.q_norm.weight",
            "k_norm": "self_attn.k_norm.weight",
            **{name: f"self_attn.{name}_proj.weight" for name in "qkvo"},
        }
        state = {"model.embed_tokens.weight": self.embedding, "lm_head.weight": self.embedding}
        state["model.norm.weight"] = self.final_norm
        for number, layer in enumerate(self.layers):
            for name, weight in layer.named_parameters():
                state[f"model.layers.{number}.{names[name]}"] = weight
        model.load_state_dict(state, strict=True)
        return model


@dataclass(frozen=True)
class Routing:
    """One layer's routing of N tokens: logits (N, experts), weights and expert numbers (N, active)."""

    logits: Tensor
    weights: Tensor
    experts: Tensor


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Root-mean-square norm, in fp32."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS) * weight.float()


def rotary_tables(length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary position embedding, each (length, head_dim)."""
    frequencies = ROPE_THETA ** -(torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to (batch, heads, length, head_dim)."""
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat((left, right), -1) * cos + torch.cat((-right, left), -1) * sin


def mix_tokens(
    x: Tensor, layer: dict[str, Tensor], cos: Tensor, sin: Tensor, shape: Shape
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Attention and routing of one layer.

    Returns the residual stream, the experts' input (N, hidden), the router's
    logits and (weights, experts) of the chosen experts.
    """
    batch, length, hidden = x.shape
    dtype = layer["q"].dtype
    normed = rms_norm(x, layer["input_norm"]).to(dtype)

    def heads(name: str) -> Tensor:
        projected = F.linear(normed, layer[name]).view(batch, length, -1, shape.head_dim)
        if shape.query_key_norm and name != "v":
            projected = rms_norm(projected.float(), layer[f"{name}_norm"])
        return projected.transpose(1, 2)

    q, k = (rotate(heads(name), cos, sin).to(dtype) for name in "qk")
    x = x + F.linear(causal_attention(q, k, heads("v").contiguous()), layer["o"])
    normed = rms_norm(x, layer["expert_norm"]).to(dtype).view(-1, hidden)
    # The router's softmax is fp32, as in transformers.
    logits = F.linear(normed, layer["router"]).float()
    chosen, experts = torch.topk(logits, shape.active, dim=-1)
    # A softmax over the chosen logits is the renormalised top-k of the full softmax.
    return x, normed, logits, (chosen.softmax(-1), experts)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of (batch, heads, length, head_dim); returns (batch, length, heads * head_dim).

    The heads of a group share their keys, so they are one product.  A block of
    queries sees only the keys up to its end, which saves nearly half the work.
    """
    batch, heads, length, dim = q.shape
    groups = k.shape[1]
    q = q.reshape(batch, groups, heads // groups, length, dim)
    size = max(QUERY_BLOCK, length // MAX_BLOCKS)
    outputs = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        block = q[:, :, :, start:stop].reshape(batch, groups, -1, dim)
        scores = (block @ k[:, :, :stop].transpose(-1, -2)).view(batch, heads, stop - start, stop)
        future = torch.ones(stop - start, stop, dtype=torch.bool, device=q.device).triu(start + 1)
        scores = (scores * dim**-0.5).masked_fill(future, -math.inf)
        shares = scores.float().softmax(-1).to(q.dtype).view(batch, groups, -1, stop)
        outputs.append((shares @ v[:, :, :stop]).view(batch, heads, stop - start, dim))
    return torch.cat(outputs, dim=2).transpose(1, 2).reshape(batch, length, heads * dim)


class Experts(torch.autograd.Function):
    """The weighted sum of each token's chosen experts, with a hand-written backward.

    Rows are sorted by expert; each expert then is a few products over its own
    slice, written in place, and the elementwise work is done for all at once.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        active = experts.shape[1]
        flat = experts.reshape(-1)
        order = flat.argsort(stable=True)
        ends = torch.bincount(flat, minlength=len(gate_up)).cumsum(0).tolist()
        slices = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        rows = x.index_select(0, order // active)
        sorted_weights = weights.reshape(-1, 1)[order].to(x.dtype)
        inner = products(rows, gate_up.transpose(1, 2), slices)
        gate, up = inner.chunk(2, dim=-1)
        weighted = F.silu(gate).mul_(up).mul_(sorted_weights)
        outputs = products(weighted, down.transpose(1, 2), slices)
        ctx.save_for_backward(rows, inner, weighted, sorted_weights, order, gate_up, down)
        ctx.slices, ctx.active = slices, active
        return gather_tokens(outputs, order, active)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        rows, inner, weighted, weights, order, gate_up, down = ctx.saved_tensors
        by_row = gradient.to(rows.dtype).index_select(0, order // ctx.active)
        d_weighted = products(by_row, down, ctx.slices)
        d_inner, d_weights = swiglu_backward(inner, d_weighted, weights)
        d_x = gather_tokens(products(d_inner, gate_up, ctx.slices), order, ctx.active)
        d_flat = torch.empty_like(d_weights).index_copy_(0, order, d_weights)
        return (
            d_x,
            outer_products(d_inner, rows, ctx.slices),
            outer_products(by_row, weighted, ctx.slices),
            d_flat.view(-1, ctx.active),
            None,
        )


def products(rows: Tensor, matrices: Tensor, slices: list[slice]) -> Tensor:
    """Each expert's slice of ``rows`` times its matrix."""
    result = rows.new_empty(len(rows), matrices.shape[2])
    for expert, part in enumerate(slices):
        torch.mm(rows[part], matrices[expert], out=result[part])
    return result


def outer_products(left: Tensor, right: Tensor, slices: list[slice]) -> Tensor:
    """Each expert's ``left`` transposed times ``right``: the gradient of its matrix."""
    result = left.new_empty(len(slices), left.shape[1], right.shape[1])
    for expert, part in enumerate(slices):
        torch.mm(left[part].t(), right[part], out=result[expert])
    return result


def gather_tokens(rows: Tensor, order: Tensor, active: int) -> Tensor:
    """Sum the ``active`` rows of every token; ``order`` says where each row came from."""
    position = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    parts = rows.index_select(0, position).view(-1, active, rows.shape[1]).unbind(1)
    # Adding whole columns is several times as fast as sum(1) on a CPU.
    return functools.reduce(torch.add, parts)


def swiglu_backward(inner: Tensor, d_weighted: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of silu(gate) * up * weight for ``inner`` (gate and up) and the weight."""
    gate, up = inner.chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    d_weights = (d_weighted * silu * up).sum(-1, dtype=torch.float32)
    d_act = d_weighted * weights
    d_gate = d_act * up * (sigmoid + silu * (1 - sigmoid))
    return torch.cat((d_gate, d_act * silu), dim=-1), d_weights
