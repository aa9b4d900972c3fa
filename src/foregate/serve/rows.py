"""Batched decode steps whose rows do not depend on each other, bit for bit.

A matrix product of eight rows is rounded differently from eight products of one row, and attention over padding
differently from attention without. Either is enough to turn a near tie between two tokens. So while `rows` lasts, linear
modules, routers and attention compute each row with exactly the call that `generate` makes for one sequence; everything
else in a decoder (norms, activations, rotations, experts) works on each row by itself anyway, in widths that vector
instructions divide evenly. Experts still run once for all rows.

Up to rounding only: families whose attention is their own (gpt-oss, with sinks) or expands a compressed cache (DeepSeek).
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foregate.model.routers import find_routers

ATTENTION = "foregate_rows"  # its name in transformers' registry


@dataclass
class _Step:
    """The decode step that runs now."""

    lengths: list[int]  # real tokens of each row, the new one included
    masks: dict[int, list[torch.Tensor | None]] = field(default_factory=dict)  # one mask serves all layers


class _Current(threading.local):
    step: _Step | None = None


_current = _Current()


def prepare(model: PreTrainedModel) -> None:
    """Make `model`, loaded by `foregate.load`, heed `rows`. Without it the model computes what it always did."""
    for router in find_routers(model, model.foregate.store.layers):
        if not isinstance(router.module, nn.Linear):
            router.module.forward = _router_rows(router.module.forward)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = _linear_rows(module)
    if model.config._attn_implementation == "sdpa":  # others are given the padding, and differ by rounding
        model.set_attn_implementation(ATTENTION)


@contextlib.contextmanager
def rows(lengths: list[int]) -> Iterator[None]:
    """While this lasts, a prepared model may be called in this thread with one new token a row.

    Rows are padded on the left; row i has `lengths[i]` tokens, the new one included.
    """
    _current.step = _Step(lengths) if len(lengths) > 1 else None
    try:
        yield
    finally:
        _current.step = None


def _linear_rows(module: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        if _current.step is None:
            return F.linear(x, module.weight, module.bias)
        return torch.cat([F.linear(row, module.weight, module.bias) for row in x.split(1)])

    return forward


def _router_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with contextlib.nullcontext() if _current.step is None else _LinearRows():
            return original(*args, **kwargs)

    return forward


class _LinearRows(TorchFunctionMode):
    """Every `F.linear` of several rows is computed a row at a time, whichever code calls it."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and args and args[0].shape[0] > 1:
            return torch.cat([func(row, *args[1:], **kwargs) for row in args[0].split(1)])
        return func(*args, **kwargs)


def _attention_rows(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    step = _current.step
    if step is None:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    if mask is not None and id(mask) not in step.masks:
        step.masks[id(mask)] = _row_masks(mask, step.lengths)
    masks = step.masks[id(mask)] if mask is not None else [None] * len(step.lengths)
    outputs = []
    for row, length in enumerate(step.lengths):
        one, start = slice(row, row + 1), max(0, key.shape[2] - length)
        k, v = key[one, :, start:], value[one, :, start:]
        outputs.append(sdpa_attention_forward(module, query[one], k, v, masks[row], **options)[0])
    return torch.cat(outputs), None


def _row_masks(mask: torch.Tensor, lengths: list[int]) -> list[torch.Tensor | None]:
    """Each row's part of a mask [rows, heads, 1, width] without its padding; None where all of it is visible."""
    parts = [mask[i : i + 1, ..., max(0, mask.shape[-1] - length) :] for i, length in enumerate(lengths)]
    return [None if _all_visible(part) else part for part in parts]


def _all_visible(mask: torch.Tensor) -> bool:
    return bool(mask.all() if mask.dtype == torch.bool else (mask == 0).all())


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention_rows)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
