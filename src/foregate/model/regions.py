"""Decode steps of a backbone as captured regions, so that a card does not wait for Python between its small kernels.

A region is a largest part of the model without routed experts in it: attention, a norm, a router, a shared expert, a dense
layer. Regions are found by where the experts are, never by family. A region's forward is compiled, as CUDA graphs on a card,
when it is first called with a single token; longer calls run as they are. What cannot be captured as a whole runs eagerly,
and `note` says what. The KV cache has to stay where it is: a static one.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from transformers import PreTrainedModel

from foregate.errors import first_line
from foregate.model.experts import StreamedExperts

REFUSALS = (TorchDynamoException, FailOnRecompileLimitHit)  # raised before anything was computed


class Region:
    """The forward of one module. compile_options: for torch.compile."""

    def __init__(self, module: nn.Module, **compile_options: Any) -> None:
        self._eager = module.forward
        self._captured = torch.compile(_with_own_code(module.forward), fullgraph=True, dynamic=False, **compile_options)
        self.refused: str | None = None  # why it runs eagerly

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.refused is None and _is_one_token((*args, *kwargs.values())):
            try:
                return self._captured(*args, **kwargs)
            except REFUSALS as error:
                self.refused = first_line(error)
        return self._eager(*args, **kwargs)


class Regions:
    """The regions of a model, in place from now on. Raises nothing: what cannot be captured is found while it runs."""

    def __init__(self, model: PreTrainedModel, **compile_options: Any) -> None:
        self.by_name: dict[str, Region] = {}
        for name, module in _without_experts(model):
            module.forward = self.by_name[name] = Region(module, **compile_options)
        model.register_forward_pre_hook(_begin_step)

    @property
    def note(self) -> str:
        """What runs how, for the report."""
        refused = {name: region.refused for name, region in self.by_name.items() if region.refused is not None}
        captured = f"{len(self.by_name) - len(refused)} regions captured"
        if not refused:
            return captured
        name, why = next(iter(refused.items()))
        return f"{captured}, {len(refused)} eager, first {name}: {why}"


def can_be_captured(model: PreTrainedModel) -> bool:
    """Whether the family has a static KV cache, and code that transformers compiles as a whole."""
    return bool(getattr(model, "_can_compile_fullgraph", False))


def _without_experts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, StreamedExperts):
            continue
        if any(isinstance(part, StreamedExperts) for part in child.modules()):
            yield from _without_experts(child, f"{prefix}{name}.")
        elif any(True for _ in child.parameters()):
            yield prefix + name, child


def _is_one_token(values: tuple) -> bool:
    """Whether the first hidden states among a call's arguments are of a single token."""
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.numel() == value.shape[-1]
    return False


def _begin_step(model: nn.Module, args: tuple) -> None:
    """What the graphs of the last step returned is not used any more."""
    torch.compiler.cudagraph_mark_step_begin()


def _with_own_code(function: Callable) -> Callable:
    """The same function with a code object of its own.

    What was compiled is kept by code object and tried in turn at every call; regions of one class would be in each
    other's way, and soon over the limit of how often one is compiled.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    forward.__code__ = forward.__code__.replace()
    return forward
