"""Guesses without training: the next layer's router on this layer's router input.

`NextRouter` is Mixtral-offloading's, no norm in between, a predictor by itself. `OwnRouters` is what a scheduler hears
beside gates, to fall back on where they do worse: gates of horizon 1 before alignment, behind the right norm.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from foregate.checkpoint.store import LayerInfo
from foregate.lookahead.untrained import untrained_of_model
from foregate.model.routers import Router, find_routers, router_input
from foregate.schedule import Prediction


class OwnRouters:
    """Probabilities of the next layer's experts within a token. Raises ForegateError when a router cannot be found."""

    def __init__(self, model: PreTrainedModel, layers: tuple[LayerInfo, ...]) -> None:
        self._gates = untrained_of_model(model, layers, horizon=1).gates[: len(layers) - 1]

    @torch.inference_mode()
    def guess(self, layer: int, hidden: torch.Tensor) -> np.ndarray | None:
        """float32 [experts] of the layer after `layer`, that any of the tokens chooses it; None after the last layer.

        hidden: float32 [tokens, inputs], the router's input of `layer`.
        """
        if layer >= len(self._gates):
            return None
        gate = self._gates[layer]
        chosen = gate.probabilities(gate(hidden, hidden.new_zeros(len(hidden), gate.sizes[0])))[0]
        return (1.0 - (1.0 - chosen).prod(0)).numpy()


class NextRouter:
    """An engine's `Predictor` without training. Layers whose router is not a linear map of the same input are not guessed."""

    def __init__(self, model: PreTrainedModel, layers: tuple[LayerInfo, ...]) -> None:
        self._routers = find_routers(model, layers)
        self._input: dict[int, torch.Tensor] = {}  # layer -> the last token's router input
        for layer, router in enumerate(self._routers):
            self._watch(layer, router)

    def take(self, layer: int) -> tuple[torch.Tensor, ...]:
        """The router input of the last token of the call of `layer` to come, where the model computed it."""
        return (self._input.pop(layer)[None],)

    def give(self, layer: int, seen: Sequence[torch.Tensor]) -> None:
        """The same in host memory."""
        self._input[layer] = seen[0][0]

    def routed(self, layer: int, chosen: torch.Tensor) -> None:
        """Nothing to learn from."""

    def predict(self, layer: int) -> Prediction | None:
        """The next layer's scores as if they were probabilities: only their order counts."""
        start, hidden = time.perf_counter(), self._input.pop(layer).float()
        if layer + 1 == len(self._routers):
            return None
        router = self._routers[layer + 1]
        if router.weight is None or router.weight.shape[1] != len(hidden):
            return None
        logits = router.weight @ hidden if router.bias is None else router.weight @ hidden + router.bias
        probabilities: np.ndarray = torch.sigmoid(logits - logits.mean()).numpy()
        return Prediction(layer, ((layer + 1, probabilities),), seconds=time.perf_counter() - start)

    def _watch(self, layer: int, router: Router) -> None:
        def note(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            hidden = router_input(args, kwargs)
            self._input[layer] = hidden.detach().reshape(-1, hidden.shape[-1])[-1]

        router.module.register_forward_hook(note, with_kwargs=True)
