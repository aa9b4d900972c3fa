"""Gates at work: they watch a model's routers while it runs and say what follows.

They only look. What the model computes does not depend on them.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from foregate.engine import Engine
from foregate.errors import ForegateError
from foregate.kernels import cpu
from foregate.lookahead.gates import LookaheadGates
from foregate.lookahead.guess import OwnRouters
from foregate.lookahead.packed import PackedGates
from foregate.model.routers import Router, find_routers, router_input
from foregate.schedule import Prediction


class LiveGates:
    """The gates of a running model; an engine's `Predictor`. It follows one sequence (see `LookaheadGates`)."""

    def __init__(self, gates: LookaheadGates, model: PreTrainedModel, engine: Engine) -> None:
        """Raises ForegateError when the gates are of a model of another size."""
        self._engine = engine
        self._gates = PackedGates(gates) if cpu.available() else gates
        self._targets = [[target.layer for target in targets] for targets in gates.targets]
        self._noted: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # layer -> router inputs and scores of its call
        self._routers = OwnRouters(model, engine.store.layers)
        for layer, router in enumerate(find_routers(model, engine.store.layers)):
            if router.input_size != gates.header.input_size(layer):
                raise ForegateError(
                    f"the lookahead gates were trained for routers of {gates.header.input_size(layer)} inputs, "
                    f"{router.name} has {router.input_size}: train gates for this model with foregate align"
                )
            self._watch(layer, router)
        model.get_input_embeddings().register_forward_hook(self._embedded)

    def take(self, layer: int) -> tuple[torch.Tensor, ...]:
        """Router inputs and scores of the call of `layer` to come, where the model computed them."""
        return self._noted.pop(layer)

    def give(self, layer: int, seen: Sequence[torch.Tensor]) -> None:
        """The same in host memory."""
        hidden, scores = seen
        self._noted[layer] = hidden, scores

    def routed(self, layer: int, chosen: torch.Tensor) -> None:
        """The router of `layer`, just watched, chose these experts: int [tokens, top_k]."""
        self._gates.observe(layer, self._noted[layer][1], chosen)

    def predict(self, layer: int) -> Prediction:
        """What follows the call of `layer` that `routed` was told of."""
        start = time.perf_counter()
        hidden, _ = self._noted.pop(layer)
        return self._prediction(layer, hidden.float(), layer, start)

    def _prediction(self, source: int, hidden: torch.Tensor, layer: int, start: float) -> Prediction:
        foreseen, targets = self._gates.foresee(source, hidden), self._targets[source]
        ahead = tuple(zip(targets, foreseen.ahead, strict=True))
        token = source == len(self._targets) - 1
        guess = self._routers.guess(layer, hidden) if not token and self._engine.wants_guess else None
        return Prediction(layer, ahead, foreseen.reuse, token, time.perf_counter() - start, guess)

    def _watch(self, layer: int, router: Router) -> None:
        def note(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            self._noted[layer] = _rows(router_input(args, kwargs)), router.scores(output).detach()

        router.module.register_forward_hook(note, with_kwargs=True)

    def _embedded(self, module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        """The token that was just sampled gives away its first layers' experts; a prompt's start is no sampled token."""
        hidden = _rows(output)
        if len(hidden) == 1 and self._engine.listens:
            self._engine.settle()  # first everything of the token before
            start, last = time.perf_counter(), len(self._targets) - 1
            self._engine.expect(self._prediction(last, hidden.cpu().float(), last - 1, start))


def _rows(hidden: torch.Tensor) -> torch.Tensor:
    """[tokens, size] of [..., size], without the graph that a caller outside of `torch.no_grad` has asked for."""
    return hidden.detach().reshape(-1, hidden.shape[-1])
