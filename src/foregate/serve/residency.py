"""The experts as they are now, for the page's grid: what the engine and its scheduler say, read and never changed."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from foregate.checkpoint.store import ExpertKey
from foregate.model.experts import experts_call


class Residency:
    """Watches the routers' choices of one model. Written by the thread that runs the model, read by any."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._engine = model.foregate
        self._layers = self._engine.store.layers
        self._chosen: list[tuple[int, ...]] = [()] * len(self._layers)
        self._missed: list[tuple[int, ...]] = [()] * len(self._layers)
        for layer, info in enumerate(self._layers):
            self._watch(layer, model.get_submodule(info.module))

    def snapshot(self) -> list[dict[str, Any]]:
        """For each MoE layer its experts by state: sorted indices.

        resident: in memory now. fetching: on their way into a slot. predicted: expected to be chosen soon. chosen: by
        the layer's last tokens; missed: those of them that were not resident at that moment.
        """
        expected = expected_experts(self._engine)
        return [
            {
                "num_experts": info.num_experts,
                "top_k": info.top_k,
                "resident": [e for e in range(info.num_experts) if self._engine.scheduler.is_resident((layer, e))],
                "fetching": _of_layer(layer, expected["fetching"]),
                "predicted": _of_layer(layer, expected["predicted"]),
                "chosen": list(self._chosen[layer]),
                "missed": list(self._missed[layer]),
            }
            for layer, info in enumerate(self._layers)
        ]

    def _watch(self, layer: int, experts: nn.Module) -> None:
        count = self._layers[layer].num_experts

        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            chosen = torch.unique(experts_call(args, kwargs).chosen).tolist()
            used = tuple(expert for expert in chosen if 0 <= expert < count)
            self._missed[layer] = tuple(e for e in used if not self._engine.scheduler.is_resident((layer, e)))
            self._chosen[layer] = used

        experts.register_forward_pre_hook(note, with_kwargs=True)


def expected_experts(engine: Any) -> dict[str, set[ExpertKey]]:
    """What the scheduler is fetching, and what its predictions expect."""
    return {"fetching": set(engine.scheduler.in_flight()), "predicted": set(engine.scheduler.expected())}


def _of_layer(layer: int, keys: Iterable[ExpertKey]) -> list[int]:
    return sorted(expert for key_layer, expert in keys if key_layer == layer)
