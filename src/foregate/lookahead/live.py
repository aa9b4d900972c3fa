"""Gates at work: they watch a model's routers while it runs and tell the scheduler what to expect.

They only look. What the model computes does not depend on them.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from foregate.checkpoint.store import LayerInfo
from foregate.errors import ForegateError
from foregate.lookahead.gates import LookaheadGates
from foregate.model.routers import Router, find_routers, router_input
from foregate.schedule.lookahead import LookaheadScheduler

HISTORY_TOKENS = 64  # of a prompt's end that the use history takes in; older ones have faded


class LiveGates:
    """The gates of a running model. Of several tokens at once the last one counts: it is what the next token follows."""

    def __init__(self, gates: LookaheadGates, model: PreTrainedModel, layers: tuple[LayerInfo, ...]) -> None:
        self.gates = gates
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # layer -> router input and scores, last tokens
        for layer, router in enumerate(find_routers(model, layers)):
            if router.input_size != gates.header.input_size(layer):
                raise ForegateError(
                    f"the lookahead gates were trained for routers of {gates.header.input_size(layer)} inputs, "
                    f"{router.name} has {router.input_size}: train gates for this model with foregate align"
                )
            self._watch(layer, router)

    def routed(self, layer: int, chosen: torch.Tensor, scheduler: LookaheadScheduler) -> None:
        """The router of `layer`, just watched, chose these experts: int [tokens, top_k]. Tell the scheduler."""
        hidden, scores = self._seen.pop(layer)
        for token_scores, experts in zip(scores, chosen[-HISTORY_TOKENS:], strict=True):
            self.gates.observe(layer, token_scores, experts)
        scheduler.reuse_expected(layer, self.gates.reuse(layer, hidden).sum(0).tolist())
        for target, probabilities in self.gates.predict(layer, hidden):
            scheduler.choice_expected(target.layer, probabilities.tolist())

    def _watch(self, layer: int, router: Router) -> None:
        def note(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            hidden = router_input(args, kwargs)
            last = hidden.reshape(-1, hidden.shape[-1])[-1].float()
            self._seen[layer] = last, router.scores(output)[-HISTORY_TOKENS:].float()

        router.module.register_forward_hook(note, with_kwargs=True)
