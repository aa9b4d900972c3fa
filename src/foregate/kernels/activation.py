"""What an experts module does between its two matrices: asked of its own code, and as PyTorch computes it."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from foregate.kernels.cpu import GPT_OSS, Activation

PROBE = 64  # values that tell activations apart

Apply = Callable[[Activation, torch.Tensor], torch.Tensor]


def find_activation(experts: nn.Module, apply: Apply) -> Activation | None:
    """Which of the activations that kernels know the module's own code computes; None if none.

    The code is asked, not its name: on values from tiny to beyond every clamp it must agree with what `apply` makes of
    them, float32 [1, rows of the first matrix].
    """
    if getattr(experts, "has_post_expert_norm", False):
        return None
    magnitudes = torch.logspace(-3, 4, PROBE)
    values = torch.cat([magnitudes, -magnitudes]).repeat(8)
    values = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))].view(1, -1)
    try:
        with torch.inference_mode():
            expected = experts._apply_gate(values) if experts.has_gate else experts.act_fn(values)
    except Exception:  # code that does not run on a probe is code that no kernel knows
        return None
    for candidate in _candidates(experts.has_gate):
        if torch.allclose(apply(candidate, values), expected, rtol=1e-5, atol=1e-6):
            return candidate
    return None


def apply_activation(activation: Activation, values: torch.Tensor) -> torch.Tensor:
    """Inner values [tokens, inner] from what the first matrix gives, [tokens, rows], step by step."""
    if activation.layout == "ungated":
        return _function(activation, values)
    interleaved = activation.layout == "interleaved"
    gate, up = (values[:, ::2], values[:, 1::2]) if interleaved else values.chunk(2, dim=-1)
    gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    return _function(activation, gate) * (up + activation.up_offset)


def _function(activation: Activation, values: torch.Tensor) -> torch.Tensor:
    if activation.function == "silu":
        return values * torch.sigmoid(activation.alpha * values)
    if activation.function == "relu2":
        return functional.relu(values).square()
    if activation.function == "relu":
        return functional.relu(values)
    return functional.gelu(values, approximate="tanh" if activation.function == "gelu_tanh" else "none")


def _candidates(gated: bool) -> list[Activation]:
    functions = ("silu", "gelu_tanh", "gelu", "relu2", "relu")
    if not gated:
        return [Activation(function, "ungated") for function in functions]
    plain = [Activation(function, layout) for layout in ("concatenated", "interleaved") for function in functions]
    return [*plain, GPT_OSS]
