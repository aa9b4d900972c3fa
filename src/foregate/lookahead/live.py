"""Gates at work: they watch a model's routers while it runs and say what follows.

They only look. What the model computes does not depend on them. A decode step asks once a layer, so a gate is packed
for one token here: everything that reads the router's input is one product, the rest a few operations on small arrays.
`LookaheadGates` computes the same the obvious way.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from foregate.engine import Engine
from foregate.errors import ForegateError
from foregate.kernels.base import Product
from foregate.lookahead.gate import LookaheadGate, token_source
from foregate.lookahead.gates import LookaheadGates
from foregate.lookahead.reuse import HALF_LIVES, NEVER, WINDOWS
from foregate.model.routers import Router, find_routers, router_input
from foregate.schedule import Prediction

HISTORY_TOKENS = 64  # of a prompt's end that the use history takes in; older ones have faded
MakeProduct = Callable[[torch.Tensor], Product]


class LiveGates:
    """The gates of a running model; an engine's `Predictor`.

    It follows one sequence. Of several tokens in one call, a prompt's or a batch's, it says which experts any of them
    will choose; the last one counts as the newest.
    """

    def __init__(self, gates: LookaheadGates, model: PreTrainedModel, engine: Engine) -> None:
        """Raises ForegateError when the gates are of a model of another size."""
        self._engine = engine
        self._gates = [PackedGate(gate, lambda matrix: engine.kernel.product(matrix, True)) for gate in gates.gates]
        self._targets = [[target.layer for target in targets] for targets in gates.targets]
        self._recent = [np.zeros(layer.num_experts, np.float32) for layer in gates.header.layers]
        self._history = [UseHistory(layer.num_experts) for layer in gates.header.layers]
        self._input: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # layer -> router inputs and scores of its call
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
        return self._input.pop(layer)

    def give(self, layer: int, seen: Sequence[torch.Tensor]) -> None:
        """The same in host memory."""
        hidden, scores = seen
        self._input[layer] = hidden, scores

    def routed(self, layer: int, chosen: torch.Tensor) -> None:
        """The router of `layer`, just watched, chose these experts: int [tokens, top_k]."""
        scores = self._input[layer][1]
        experts, history = len(self._recent[layer]), self._history[layer]
        for row in chosen[-HISTORY_TOKENS:].tolist():
            history.observe([expert for expert in row if 0 <= expert < experts])
        self._recent[layer] = scores[-1, :experts].float().numpy()

    def predict(self, layer: int) -> Prediction:
        """What follows the call of `layer` that `routed` was told of."""
        start = time.perf_counter()
        hidden, _ = self._input.pop(layer)
        return self._prediction(layer, hidden.float(), layer, start)

    def _prediction(self, source: int, hidden: torch.Tensor, layer: int, start: float) -> Prediction:
        gate, targets, token = self._gates[source], self._targets[source], source == len(self._recent)
        recent = np.concatenate([self._recent[target] for target in targets])
        features = None if token else self._history[layer].features(self._recent[layer])
        parts, reuse = gate(hidden.contiguous(), recent, features)
        ahead = tuple(zip(targets, parts, strict=True))
        return Prediction(layer, ahead, reuse, token, time.perf_counter() - start)

    def _watch(self, layer: int, router: Router) -> None:
        def note(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            hidden = router_input(args, kwargs)
            self._input[layer] = hidden.reshape(-1, hidden.shape[-1]), router.scores(output)

        router.module.register_forward_hook(note, with_kwargs=True)

    def _embedded(self, module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        """The token that was just sampled gives away its first layers' experts; a prompt's start is no sampled token."""
        hidden = output.reshape(-1, output.shape[-1])
        if len(hidden) == 1 and self._engine.listens:
            start, last = time.perf_counter(), len(self._recent)
            self._engine.expect(self._prediction(last, token_source(hidden.cpu()), last - 1, start))


class PackedGate:
    """A gate and its layer's reuse head, packed for single tokens."""

    def __init__(self, gate: LookaheadGate, make_product: MakeProduct) -> None:
        self._sizes, self._top_k = gate.sizes, gate.top_k
        self._ends = np.cumsum(gate.sizes).tolist()
        inputs = gate.base.shape[1]
        self._bias, self._down_bias = gate.bias.numpy(), gate.down_bias.numpy()
        self._down_recent, self._up = gate.down[:, inputs:].contiguous().numpy(), gate.up.numpy()
        self._scale = np.repeat(gate.scale.numpy(), gate.sizes)  # of each output
        self._shift = np.repeat(gate.shift.numpy(), gate.sizes)
        rows, self._reuse = [gate.base, gate.down[:, :inputs]], None
        if gate.reuse is not None:
            head = gate.reuse
            rows.append(head.down)
            self._reuse = [t.numpy() for t in (head.down_bias, head.up, head.bias, head.shared)]
        self._product = make_product(torch.cat(rows).half().contiguous())  # float16, as the gates' file holds them
        self._logits, self._inner = sum(gate.sizes), len(gate.down)

    def __call__(
        self, hidden: torch.Tensor, recent: np.ndarray, features: np.ndarray | None
    ) -> tuple[list[np.ndarray], np.ndarray | None]:
        """hidden: float32 [tokens, inputs]; recent: [outputs], the targets' latest scores; features: of the reuse head.

        Returns the probabilities [experts] of each target, that any of the tokens chooses the expert, and those of reuse
        [windows, experts] after the last token, or None.
        """
        products = self._product(hidden).numpy()
        logits = products[:, : self._logits] + self._bias
        if self._inner:
            inner = products[:, self._logits : self._logits + self._inner] + (
                self._down_recent @ recent + self._down_bias
            )
            logits += _silu(inner) @ self._up.T
        parts = np.split(self._chosen(logits), self._ends[:-1])
        if self._reuse is None or features is None:
            return parts, None
        bias, up, up_bias, shared = self._reuse
        own = up @ _silu(products[-1, self._logits + self._inner :] + bias) + up_bias
        return parts, _sigmoid(own.reshape(len(WINDOWS), -1) + shared @ features)

    def _chosen(self, logits: np.ndarray) -> np.ndarray:
        """Probabilities [outputs] that any of the tokens chooses the expert. logits: [tokens, outputs]."""
        edges = np.empty_like(logits)
        start = 0
        for size, end, top_k in zip(self._sizes, self._ends, self._top_k, strict=True):
            edges[:, start:end] = _boundary(logits[:, start:end], min(top_k, size))
            start = end
        chosen = _sigmoid(self._scale * (logits - edges) + self._shift)
        return chosen[0] if len(chosen) == 1 else 1.0 - np.prod(1.0 - chosen, axis=0)


class UseHistory:
    """Decayed frequencies and ages of one layer's experts, token by token: what `reuse.UseHistory` keeps, in numpy."""

    def __init__(self, num_experts: int) -> None:
        self._decay = (0.5 ** (1 / np.array(HALF_LIVES, np.float32)))[:, None]
        self._values = np.zeros((len(HALF_LIVES) + 1, num_experts), np.float32)  # decayed frequencies, then ages
        self._values[-1] = NEVER

    def observe(self, experts: list[int]) -> None:
        """These experts were used by the newest token."""
        self._values[:-1] *= self._decay
        self._values[-1] += 1
        self._values[:-1, experts] += 1
        self._values[-1, experts] = 0

    def features(self, scores: np.ndarray) -> np.ndarray:
        """float32 [FEATURES, num_experts]; scores: float32 [num_experts], of the newest token."""
        return np.concatenate([np.log1p(self._values), (scores - scores.mean())[None]])


def _boundary(logits: np.ndarray, top_k: int) -> np.ndarray:
    """`gate.boundary` of [tokens, experts]: [tokens, 1]."""
    if top_k == logits.shape[1]:
        return logits.min(axis=1, keepdims=True)
    ordered = np.partition(logits, (-top_k - 1, -top_k), axis=1)
    return (ordered[:, -top_k:][:, :1] + ordered[:, -top_k - 1 : -top_k]) / 2


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 0.5 * np.tanh(0.5 * values) + 0.5


def _silu(values: np.ndarray) -> np.ndarray:
    return values * _sigmoid(values)
