"""The native kernel as a layer's kernel: whole experts in one call where the activation is one that it knows."""

import functools
from collections.abc import Hashable, Sequence

import torch
from torch import nn

from foregate.checkpoint.store import Weight
from foregate.kernels import cpu
from foregate.kernels.activation import find_activation
from foregate.kernels.base import Kernel, Product, Work
from foregate.kernels.reference import expert_mlp


class NativeKernel(Kernel):
    """C++ with SIMD chosen at run time. An activation it does not know runs in PyTorch between two native products."""

    name = "cpu"

    def __init__(self, experts: nn.Module, exact: bool) -> None:
        super().__init__(experts, exact)
        self._activation = find_activation(experts, _apply)

    @property
    def way(self) -> Hashable:
        return type(self), self._activation is None

    def prepare(self, weights: dict[str, Weight]) -> cpu.Expert | dict[str, Weight]:
        return weights if self._activation is None else _expert(weights)

    def run(self, hidden: torch.Tensor, work: Sequence[Work], outputs: torch.Tensor) -> None:
        if self._activation is None:
            for item in work:
                outputs[item.places] = expert_mlp(hidden[item.tokens], item.expert, self.experts, self._linear)
            return
        items = [cpu.Work(item.expert, item.tokens, item.places) for item in work]
        cpu.moe(hidden, items, self._activation, outputs, exact=self.exact)

    @staticmethod
    def product(matrix: Weight, exact: bool) -> Product:
        return cpu.Product(matrix, exact)

    def _linear(self, x: torch.Tensor, matrix: Weight, bias: torch.Tensor | None) -> torch.Tensor:
        y = cpu.matmul(x.contiguous(), matrix, exact=self.exact)
        return y if bias is None else y + bias.to(y.dtype)


def _apply(activation: cpu.Activation, values: torch.Tensor) -> torch.Tensor:
    """What a native activation computes, through the native code itself: identity matrices around it."""
    gated = activation.layout != "ungated"
    inner = values.shape[1] // 2 if gated else values.shape[1]
    expert = cpu.Expert(up=_identity(values.shape[1]), down=_identity(inner))
    return cpu.expert_mlp(values, expert, activation, exact=True)


@functools.cache
def _identity(size: int) -> torch.Tensor:
    return torch.eye(size)


def _expert(weights: dict[str, Weight]) -> cpu.Expert:
    first = "gate_up_proj" if "gate_up_proj" in weights else "up_proj"
    return cpu.Expert(weights[first], weights["down_proj"], weights.get(first + "_bias"), weights.get("down_proj_bias"))
