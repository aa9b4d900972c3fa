"""Machines that are not here: a consumer card behind PCIe, with the shape of a well-known model.

Times are derived, not measured: whatever a layer reads, at a share of the card's memory bandwidth, plus what a layer, a
token and a prediction take beside that, as `CardConfig` assumes it for `foregate plan` too. The backbone lies on a card in
16 bits, whatever it has in the store. The routing is that of a trace, which comes from a smaller model: its layers stand
for more layers, and its experts for several of the real ones, so that bytes and time per token are right. Such figures
say how policies compare, not what a card will do.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

from foregate.config import CardConfig
from foregate.errors import ForegateError
from foregate.quantize.matrix import plane_shapes
from foregate.schedule import Shape
from foregate.simulate.machine import Machine

BACKBONE_ITEM_BYTES = 2  # bfloat16: a card's libraries multiply it, so quantized matrices are dequantized
RESERVED_BYTES = 3 << 29  # KV cache, activations and the driver
ALIGNMENT = 4096  # of records


@dataclass(frozen=True)
class ModelShape:
    """Sizes from a model's public configuration."""

    layers: int
    experts: int  # a layer
    top_k: int
    hidden: int
    expert_hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    def record_bytes(self, bits: int) -> int:
        """One expert: gate and up side by side, and down."""
        planes = _matrix_bytes(bits, 2 * self.expert_hidden, self.hidden)
        planes += _matrix_bytes(bits, self.hidden, self.expert_hidden)
        return -(-planes // ALIGNMENT) * ALIGNMENT

    @property
    def attention_bytes(self) -> int:
        """A layer's attention matrices: what goes into it, and its output."""
        outputs = (2 * self.heads + 2 * self.kv_heads) * self.head_dim
        return BACKBONE_ITEM_BYTES * outputs * self.hidden

    @property
    def head_bytes(self) -> int:
        """The output matrix; the embedding is as large again."""
        return BACKBONE_ITEM_BYTES * self.vocabulary * self.hidden


@dataclass(frozen=True)
class Card:
    """A GPU, by its data sheet."""

    name: str
    memory_bytes: int
    bandwidth: float  # bytes/s of its own memory


MODELS = {
    "mixtral-8x7b": ModelShape(32, 8, 2, 4096, 14336, 32, 8, 128, 32000),
    "qwen3-30b-a3b": ModelShape(48, 128, 8, 2048, 768, 32, 4, 128, 151936),
}
BITS = (4, 3, 2)
CARDS = {"12gb": Card("RTX 3060", 12 << 30, 360e9), "24gb": Card("RTX 3090", 24 << 30, 936e9)}
LINKS = {"pcie3": 12e9, "pcie4": 24e9, "pcie5": 48e9}  # bytes/s, as typically measured over 16 lanes


@dataclass(frozen=True)
class Preset:
    """A model at a number of bits on a card behind a link."""

    model: ModelShape
    bits: int
    card: Card
    link_bandwidth: float

    def machine(self, traced: Shape) -> Machine:
        """The machine as a trace of a model of that shape sees it. Raises ForegateError when the shapes do not go together."""
        each, model, bandwidth = self.experts_each(traced), self.model, CardConfig.reached * self.card.bandwidth
        return Machine(
            record_bytes=each * self.record_bytes,
            link_bandwidth=self.link_bandwidth,
            link_latency=each * CardConfig.link_latency,
            layer_seconds=model.attention_bytes / bandwidth + CardConfig.layer_seconds,
            expert_seconds=each * self.record_bytes / bandwidth,
            token_seconds=(model.head_bytes / bandwidth + CardConfig.token_seconds) / self.time_scale(traced),
            gate_seconds=CardConfig.gate_seconds,
        )

    def experts_each(self, traced: Shape) -> int:
        """Experts of the model that one of the trace stands for."""
        top_k = max(traced.top_k)
        if self.model.top_k % top_k:
            raise ForegateError(
                f"the machine's model uses {self.model.top_k} experts a token, the trace's {top_k}: "
                f"take a trace of a model with a top-k that divides it"
            )
        return self.model.top_k // top_k

    def time_scale(self, traced: Shape) -> float:
        """Layers of the model that one of the trace stands for."""
        return self.model.layers / traced.layers

    @cached_property
    def record_bytes(self) -> int:
        return self.model.record_bytes(self.bits)

    @property
    def share_that_fits(self) -> float:
        """Of the experts, in all of the card's memory."""
        model = self.model
        free = self.card.memory_bytes - RESERVED_BYTES - model.layers * model.attention_bytes - 2 * model.head_bytes
        return min(1.0, free / (self.record_bytes * model.experts * model.layers))

    def describe(self, traced: Shape) -> str:
        """What a reader of the figures must know."""
        return (
            f"projected: times derived from {self.card.name}'s data sheet ({self.card.bandwidth / 1e9:g} GB/s, "
            f"{CardConfig.reached:.0%} reached), {CardConfig.layer_seconds * 1e3:g} ms a layer, "
            f"{CardConfig.gate_seconds * 1e3:g} ms a prediction and {CardConfig.token_seconds * 1e3:g} ms a token assumed "
            f"beside it; routing of a model with {traced.layers} MoE layers of {max(traced.experts)} "
            f"experts, top-{max(traced.top_k)}, for one with {self.model.layers} of {self.model.experts}, "
            f"top-{self.model.top_k}; all of the card has room for {self.share_that_fits:.0%} of the experts"
        )


def preset(name: str) -> Preset:
    """By a name such as mixtral-8x7b-4bit-12gb-pcie4. Raises ForegateError for an unknown one."""
    known = {
        f"{model}-{bits}bit-{card}-{link}": (model, bits, card, link)
        for model, bits, card, link in product(MODELS, BITS, CARDS, LINKS)
    }
    if name not in known:
        parts = " - ".join("|".join(names) for names in (MODELS, (f"{bits}bit" for bits in BITS), CARDS, LINKS))
        raise ForegateError(f"unknown machine {name}: names are {parts}, joined by -")
    model, bits, card, link = known[name]
    return Preset(MODELS[model], bits, CARDS[card], LINKS[link])


def _matrix_bytes(bits: int, rows: int, cols: int) -> int:
    return sum(dtype.itemsize * prod(shape) for dtype, shape in plane_shapes(bits, rows, cols).values())
