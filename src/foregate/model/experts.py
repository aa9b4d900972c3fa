"""The plug-in for transformers: experts modules without weights that ask the engine instead."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from foregate.engine import Engine


class ExpertsCall(NamedTuple):
    """What an experts module is called with, by position or name."""

    hidden: torch.Tensor  # [tokens, hidden]
    chosen: torch.Tensor  # [tokens, k]: indices of experts; one outside their range is no expert


def experts_call(args: tuple, kwargs: dict[str, Any]) -> ExpertsCall:
    """Hidden states and choice in the arguments of a call through the experts interface."""
    names = ("hidden_states", "top_k_index", "top_k_weights")
    values = dict(zip(names, args, strict=False)) | kwargs
    hidden, chosen = values["hidden_states"], values["top_k_index"]
    return ExpertsCall(hidden.reshape(-1, hidden.shape[-1]), chosen.reshape(-1, chosen.shape[-1]))


@contextlib.contextmanager
def silent_experts(modules: list[nn.Module]) -> Iterator[None]:
    """While this context lasts these experts add nothing, and nothing is read for them."""
    try:
        for module in modules:
            module.forward = lambda hidden_states, *args, **kwargs: torch.zeros_like(hidden_states)
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


class StreamedExperts:
    """Mixed into a family's experts class: same call, no parameters; `connect` says where results come from."""

    _engine: Engine | None = None
    _layer: int = -1

    def connect(self, engine: Engine, layer: int) -> None:
        """Answer calls by MoE layer `layer` of `engine`."""
        self._engine, self._layer = engine, layer

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [..., hidden], index and weights [tokens, k]; returns the shape of hidden_states."""
        if self._engine is None:
            raise RuntimeError("these experts are not connected to an engine: load the model with foregate.load")
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        result = self._engine.run_layer(self._layer, flat, top_k_index, top_k_weights)
        return result.to(hidden_states.dtype).view(hidden_states.shape)


def _streamed(experts_class: type[nn.Module]) -> type[nn.Module]:
    def __init__(self: nn.Module, *args: object, **kwargs: object) -> None:
        with torch.device("meta"):  # the weights' shapes are made, never their memory
            experts_class.__init__(self, *args, **kwargs)
        for name, param in list(self._parameters.items()):
            del self._parameters[name]
            setattr(self, name, param.data)  # no parameter any more; some blocks name it when they initialise weights
        self._is_hf_initialized = True  # there is nothing to initialise

    return type("Streamed" + experts_class.__name__, (StreamedExperts, experts_class), {"__init__": __init__})


@contextlib.contextmanager
def streamed_experts(classes: set[type[nn.Module]]) -> Iterator[None]:
    """While this context lasts, models are built with streamed experts in the place of these classes.

    A model builds its experts by the class's name in its own module; swapping that name is all it takes, and the
    family's modelling code runs unchanged. (transformers' patch registry would do, but in 5.17 it imports every model.)
    """
    saved = [(sys.modules[cls.__module__], cls.__name__, cls) for cls in classes]
    try:
        for module, name, cls in saved:
            setattr(module, name, _streamed(cls))
        yield
    finally:
        for module, name, cls in saved:
            setattr(module, name, cls)
