"""The reference kernel: PyTorch, obvious, the truth that faster kernels are tested against."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

from foregate.checkpoint.store import Weight
from foregate.kernels.base import Kernel, Product, Work
from foregate.quantize.matrix import QuantizedMatrix

# Matrix products round a row differently when it stands alone or at the ragged end of a batch. Padding the rows to a
# multiple of 8 makes a token's result independent of the tokens beside it.
ROW_BLOCK = 8

Linear = Callable[[torch.Tensor, Weight, torch.Tensor | None], torch.Tensor]


class ReferenceKernel(Kernel):
    """Dequantizes an expert, then multiplies; always exact."""

    name = "reference"

    def prepare(self, weights: dict[str, Weight]) -> dict[str, Weight]:
        return weights

    def run(self, hidden: torch.Tensor, work: Sequence[Work], outputs: torch.Tensor) -> None:
        for item in work:
            x = hidden[item.tokens]
            outputs[item.places] = expert_mlp(_pad(x), item.expert, self.experts, _linear)[: len(x)]

    @staticmethod
    def product(matrix: Weight, exact: bool) -> Product:
        return lambda x: _linear(_pad(x), matrix, None)[: len(x)]


def expert_mlp(x: torch.Tensor, weights: dict[str, Weight], experts: nn.Module, linear: Linear) -> torch.Tensor:
    """One expert on some tokens, as the family's experts module defines it: down(act(gate(x)) * up(x)).

    x: [tokens, hidden]. weights: the expert's parameters by name, matrices [out, in], biases [out]. linear: multiplies
    tokens by a matrix and adds a bias or None. Returns [tokens, hidden].
    """
    inner = expert_inner(x, weights, experts, linear)
    y = linear(inner, weights["down_proj"], weights.get("down_proj_bias"))
    return experts.post_expert_norm(y) if getattr(experts, "has_post_expert_norm", False) else y


def expert_inner(x: torch.Tensor, weights: dict[str, Weight], experts: nn.Module, linear: Linear) -> torch.Tensor:
    """What the down matrix of an expert is given: act(gate(x)) * up(x), [tokens, inner]. Arguments as of `expert_mlp`."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    inner = linear(x, weights[first], weights.get(first + "_bias"))
    return experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)


def _pad(x: torch.Tensor) -> torch.Tensor:
    return functional.pad(x, (0, 0, 0, -len(x) % ROW_BLOCK))


def _linear(x: torch.Tensor, matrix: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    weight = matrix.dequantize() if isinstance(matrix, QuantizedMatrix) else matrix
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
