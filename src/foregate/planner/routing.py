"""Recorded routing to simulate with: what the routers of the demo models chose, and what their gates said of it.

A short stretch of each demo model's held-out text comes with the package (`benchmarks/plan_routing.py` makes it). The
gates' probabilities are kept in a byte each.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from foregate.schedule import Call, Prediction, Shape

NAMES = ("mixtral-tiny", "qwen3-moe-tiny")
LEVELS = 255  # of a probability; the square root is kept, so that small ones differ too


@dataclass(frozen=True)
class Routing:
    """Tokens as a scheduler would meet them, one by one."""

    name: str  # of the model whose routing it is
    shape: Shape
    calls: tuple[Call, ...]

    @property
    def experts_per_choice(self) -> float:
        """Experts of a layer for each one that a token uses: how sparse the model is."""
        return max(self.shape.experts) / max(self.shape.top_k)


def load_routing(name: str) -> Routing:
    """One of `NAMES`."""
    with safe_open(Path(__file__).with_name(f"{name}.safetensors"), framework="pt") as file:
        facts = json.loads(file.metadata()["foregate"])
        chosen, said = file.get_tensor("chosen"), file.get_tensor("said").numpy()
    shape = Shape(tuple(facts["experts"]), tuple(facts["top_k"]))
    probabilities = np.square(said / LEVELS, dtype=np.float32)
    return Routing(name, shape, tuple(_calls(shape, facts, chosen, probabilities)))


def save_routing(path: Path, calls: Sequence[Call], shape: Shape) -> None:
    """Write calls of whole tokens, with their gates' predictions, as `load_routing` reads them."""
    layers = len(shape.experts)
    first = calls[:layers]
    facts = {
        "experts": shape.experts,
        "top_k": shape.top_k,
        "token": [layer for layer, _ in first[0].before.ahead],
        "ahead": [[layer for layer, _ in call.after.ahead] for call in first],
        "windows": len(first[0].after.reuse),
    }
    rows = [_values(calls[start : start + layers]) for start in range(0, len(calls), layers)]
    levels = np.rint(np.sqrt(np.stack(rows)) * LEVELS).astype(np.uint8)
    width = max(shape.top_k)
    chosen = [[*call.experts, *[call.experts[0]] * (width - len(call.experts))] for call in calls]
    tensors = {
        "chosen": torch.tensor(chosen, dtype=torch.uint8).view(-1, layers, width),
        "said": torch.from_numpy(levels),
    }
    save_file(tensors, path, {"foregate": json.dumps(facts)})


def _values(calls: Sequence[Call]) -> np.ndarray:
    """All probabilities of one token, in the order in which they are said."""
    parts = [part for _, part in calls[0].before.ahead]
    for call in calls:
        parts += [part for _, part in call.after.ahead] + [call.after.reuse.reshape(-1)]
    return np.clip(np.concatenate(parts), 0, 1)


def _calls(shape: Shape, facts: dict, chosen: torch.Tensor, said: np.ndarray) -> Iterator[Call]:
    last = len(shape.experts) - 1
    for choices, row in zip(chosen.tolist(), said, strict=True):
        before, start = _ahead(shape, facts["token"], row, 0)
        for layer, experts in enumerate(choices):
            ahead, start = _ahead(shape, facts["ahead"][layer], row, start)
            end = start + facts["windows"] * shape.experts[layer]
            after = Prediction(layer, ahead, row[start:end].reshape(facts["windows"], -1))
            start = end
            opening = Prediction(last, before, token=True) if layer == 0 else None
            yield Call(layer, tuple(sorted(set(experts))), before=opening, after=after)


def _ahead(shape: Shape, layers: list[int], row: np.ndarray, start: int) -> tuple[tuple, int]:
    parts = []
    for layer in layers:
        parts.append((layer, row[start : start + shape.experts[layer]]))
        start += shape.experts[layer]
    return tuple(parts), start
