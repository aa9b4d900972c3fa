"""What gates cost in models of real size, as shares of the model: parameters, and multiply-adds a token.

    python benchmarks/gate_cost.py --json benchmarks/results/gate-cost.json

Arithmetic on published shapes; nothing is run. Every MoE layer and the token source has a gate of horizon 3, every MoE
layer a reuse head. Learned is what alignment trains; stored adds the targets' routers that a gate carries. The
backbone's multiply-adds are its matrices but the embeddings; attention over a context and the k experts that a token
uses come on top where it is said.
"""

import argparse
import json
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foregate.config import AlignConfig
from foregate.lookahead.align import WIDTH_STEP, default_width
from foregate.lookahead.gate import GateLayer
from foregate.lookahead.gates import GatesHeader
from foregate.lookahead.reuse import FEATURES, WINDOWS

WIDTHS = (0, 64, 128, 256, 512)
CONTEXTS = (512, 4096)  # tokens that attention is over
BARS = {"learned": 0.05, "multiply_adds": 0.02}
LARGEST_WIDTH = 4096

Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """A model's published shape. Embeddings and head are not tied."""

    layers: int
    hidden: int
    experts: int
    top_k: int
    inner: int  # of an expert
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    head_norms: bool = False  # a norm over each head's queries and keys

    @property
    def multiply_adds(self) -> int:
        """Of the backbone's matrices, for one token: attention's projections, routers, head."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + self.experts * self.hidden) + self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Of everything but the experts."""
        norms = self.hidden + self.layers * 2 * (self.hidden + self.head_norms * self.head_dim)
        return self.multiply_adds + self.vocab * self.hidden + norms

    def attention(self, context: int) -> int:
        """Multiply-adds of queries with keys and weights with values, for one token."""
        return 2 * context * self.heads * self.head_dim * self.layers

    @property
    def chosen_experts(self) -> int:
        """Multiply-adds of the experts that a token uses."""
        return self.layers * self.top_k * 3 * self.hidden * self.inner

    def totals(self) -> dict[str, int]:
        """What multiply-adds can be a share of, by name."""
        totals = {"backbone": self.multiply_adds}
        totals |= {f"backbone, context {context}": self.multiply_adds + self.attention(context) for context in CONTEXTS}
        return totals | {f"{name}, with experts": total + self.chosen_experts for name, total in totals.items()}


SHAPES = {
    "Mixtral-8x7B": Shape(32, 4096, 8, 2, 14336, 32, 8, 128, 32000),
    "Qwen3-30B-A3B": Shape(48, 2048, 128, 8, 768, 32, 4, 128, 151936, head_norms=True),
}


def gates_of(shape: Shape, width: int) -> GatesHeader:
    """Gates of this width for a model of this shape."""
    layers = tuple(GateLayer(str(n), shape.experts, shape.top_k, shape.hidden) for n in range(shape.layers))
    return GatesHeader(layers, shape.hidden, AlignConfig.horizon, width, {})


def cost(shape: Shape, width: int) -> Row:
    """Numbers of all gates together, and their shares."""
    header = gates_of(shape, width)
    inner, token = header.new_gate(0), header.new_gate(shape.layers)
    factors = len(inner.sizes) * shape.hidden
    shared = len(WINDOWS) * FEATURES * (shape.experts - 1)  # these weights of a reuse head are used for every expert
    learned = shape.layers * (inner.learned_parameters + factors) + token.learned_parameters + factors
    stored = sum(p.numel() for gate in [inner] * shape.layers + [token] for p in gate.parameters())
    multiply_adds = shape.layers * (inner.multiplications + shared) + token.multiplications
    return {
        "width": width,
        "learned": learned,
        "learned_share": learned / shape.parameters,
        "stored_share": stored / shape.parameters,
        "multiply_adds": multiply_adds,
        "multiply_adds_share": {name: multiply_adds / total for name, total in shape.totals().items()},
    }


def widest(shape: Shape) -> dict[str, int | None]:
    """The largest width, a multiple of 4, within each bar; None where no width is. Costs grow with the width."""

    def within(bar: float, key: str, total: int) -> int | None:
        widths = range(WIDTH_STEP, LARGEST_WIDTH + 1, WIDTH_STEP)
        return widths[fitting - 1] if (fitting := bisect_right(widths, bar * total, key=amounts(key))) else None

    def amounts(key: str) -> Callable[[int], int]:
        return lambda width: cost(shape, width)[key]

    found = {"learned": within(BARS["learned"], "learned", shape.parameters)}
    return found | {n: within(BARS["multiply_adds"], "multiply_adds", total) for n, total in shape.totals().items()}


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def table(name: str, result: Row) -> None:
    """Print a model's costs as a table; the last row has the largest widths within the bars."""
    totals = list(result["multiply_adds_of"])
    print(f"\n**{name}**\n\n| width | learned | stored | " + " | ".join(totals) + " |\n|" + "---:|" * (len(totals) + 3))
    for row in result["rows"]:
        shares = [row["learned_share"], row["stored_share"], *row["multiply_adds_share"].values()]
        print("| " + " | ".join([str(row["width"]), *map(percent, shares)]) + " |")
    learned, *others = (str(width or "none") for width in result["widest"].values())
    print("| " + " | ".join(["widest", learned, "", *others]) + " |")


def main() -> None:
    """Compute, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    results: Row = {"horizon": AlignConfig.horizon, "bars": BARS, "models": {}}
    for name, shape in SHAPES.items():
        header = gates_of(shape, 0)
        results["models"][name] = result = {
            "shape": vars(shape),
            "backbone_parameters": shape.parameters,
            "multiply_adds_of": shape.totals(),
            "default_width": default_width(header, shape.parameters),
            "rows": [cost(shape, width) for width in WIDTHS],
            "widest": widest(shape),
        }
        table(name, result)
    arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
