"""The reference kernel: PyTorch, obvious, the truth that faster kernels are tested against."""

import torch
from torch import nn
from torch.nn import functional

# Matrix products round a row differently when it stands alone or at the ragged end of a batch. Padding the rows to a
# multiple of 8 makes a token's result independent of the tokens beside it.
ROW_BLOCK = 8


def expert_mlp(x: torch.Tensor, weights: dict[str, torch.Tensor], experts: nn.Module) -> torch.Tensor:
    """One expert on some tokens: down(act(gate(x)) * up(x)), as the family's experts module defines it.

    x: [tokens, hidden], in the compute dtype. weights: the expert's tensors by parameter name, matrices [out, in],
    biases [out], any float dtype. experts: the family's module, which says how gate and up combine. Returns
    [tokens, hidden]; each row depends on its own token alone, bit for bit.
    """
    tokens = x.shape[0]
    x = functional.pad(x, (0, 0, 0, -tokens % ROW_BLOCK))
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    inner = _linear(x, weights, first)
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    y = _linear(inner, weights, "down_proj")
    if getattr(experts, "has_post_expert_norm", False):
        y = experts.post_expert_norm(y)
    return y[:tokens]


def _linear(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    bias = weights.get(name + "_bias")
    return functional.linear(x, weights[name].to(x.dtype), None if bias is None else bias.to(x.dtype))
