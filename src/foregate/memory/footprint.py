"""What a pass of a model needs beside its weights, found by running its own code on the meta device.

Tensors on the meta device have shapes and no memory. The model's forward is run on them with every storage counted from
its making to its end: the KV cache (or recurrent state, whatever the family keeps) is what the pass leaves behind, and
its transients are what was alive at the worst moment beside it. So a family's sliding windows, latent attention and
linear attention need no rule of their own here.
"""

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from foregate.checkpoint.architecture import Architecture

SAMPLE = 64  # tokens of a short prompt; linear attention works on so many at once
MASK_BYTES = 5  # of a place in an attention mask: as a truth value, and as a number
STATE_SHARE = 0.01  # of a cache of 16 tokens, from which what does not grow counts as a state


@dataclass(frozen=True)
class Footprint:
    """Bytes of one sequence."""

    kv_cache: int  # keys, values and states of every layer, for the whole context
    transients: int  # the most that a pass holds beside them and the weights
    exact: bool  # False: estimated from the configuration, because the family's code does not run without data


def footprint(
    architecture: Architecture, context: int, prompt: int, dtype: torch.dtype, sequences: int = 1
) -> Footprint:
    """What `sequences` sequences of `context` tokens need when they are computed in `dtype`.

    Prompts are taken in alone, at most `prompt` tokens a pass; after them all sequences advance together. The
    architecture's model is converted to `dtype`, which costs nothing on the meta device.
    """
    prompt = max(1, min(prompt, context))
    model = architecture.model.to(dtype=dtype).eval()
    with _no_experts(architecture), torch.inference_mode():
        for part in (
            lambda: model,
            model.get_decoder,
        ):  # what sees beside its text part may ask an image for its values
            with contextlib.suppress(Exception):  # whatever a family's code raises on tensors without values
                return _sessions(part(), context, prompt, sequences)
    return _estimate(architecture, context, prompt, dtype, sequences)


def _sessions(model: nn.Module, context: int, prompt: int, sequences: int) -> Footprint:
    if context > 2 * SAMPLE and _has_state(model):
        return _extrapolated(model, context, prompt, sequences)
    alone = _prompt_pass(model, context, prompt)
    if sequences == 1:
        return alone
    step = _measure(model, context - 1, 1, sequences)
    return Footprint(step.kv_cache, max(alone.transients, step.transients), exact=True)


def _has_state(model: nn.Module) -> bool:
    """Whether some layers keep a state that does not grow: their prompts are long loops, too slow to run for real."""
    few, many = (_measure(model, 0, tokens).kv_cache for tokens in (8, 16))
    return 2 * few - many > STATE_SHARE * many


def _extrapolated(model: nn.Module, context: int, prompt: int, sequences: int) -> Footprint:
    """A straight line through two short prompts, and what a step costs more after a longer one."""
    one, two = (_measure(model, 0, tokens) for tokens in (SAMPLE, 2 * SAMPLE))
    after_one, after_two = (_measure(model, tokens, 1, sequences).transients for tokens in (SAMPLE, 2 * SAMPLE))

    def line(first: int, second: int, tokens: int) -> int:
        return first + max(second - first, 0) * (tokens - SAMPLE) // SAMPLE

    step = line(after_one, after_two, context)
    mask = prompt * (context - prompt) * MASK_BYTES  # of a prompt that goes on
    transients = line(one.transients, two.transients, prompt) + line(after_one, after_two, context - prompt) - after_one
    return Footprint(line(one.kv_cache, two.kv_cache, context) * sequences, max(transients + mask, step), exact=True)


def _prompt_pass(model: nn.Module, context: int, prompt: int) -> Footprint:
    """The last pass of a prompt that fills the context."""
    try:
        return _measure(model, context - prompt, prompt)
    except Exception:  # some families' prompts cannot go on after a cache
        return Footprint(_measure(model, 0, context).kv_cache, _measure(model, 0, prompt).transients, exact=True)


def _measure(model: nn.Module, cached: int, tokens: int, sequences: int = 1) -> Footprint:
    """The footprint of a pass of `tokens` tokens of each sequence after `cached` others."""
    with _Live() as live, _Attention():
        cache = _forward(model, (sequences, cached), 0, None) if cached else None
        live.peak = live.bytes
        cache = _forward(model, (sequences, tokens), cached, cache)
        kv_cache = sum(_storages(cache, {}).values())
    return Footprint(kv_cache, max(live.peak - kv_cache, 0), exact=True)


def _forward(model: nn.Module, shape: tuple[int, int], cached: int, cache: Any) -> Any:
    """One pass of tokens [sequences, tokens]; returns the cache that it leaves."""
    known = inspect.signature(model.forward).parameters
    options = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    ids = torch.zeros(shape, dtype=torch.long, device="meta")
    positions = torch.arange(cached, cached + shape[1], device="meta")[None]
    output = model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, **options)
    return output.past_key_values


def _storages(value: Any, found: dict[int, int]) -> dict[int, int]:
    """The bytes of every storage that a cache holds, whatever the family's cache looks like inside."""
    if isinstance(value, torch.Tensor):
        found[id(value.untyped_storage())] = value.untyped_storage().nbytes()
    elif isinstance(value, dict):
        for part in value.values():
            _storages(part, found)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _storages(part, found)
    elif type(value).__module__.startswith("transformers."):  # the cache, its layers, a family's own cache
        _storages(vars(value), found)
    return found


def _estimate(architecture: Architecture, context: int, prompt: int, dtype: torch.dtype, sequences: int) -> Footprint:
    """On the safe side: keys and values in every layer for the whole context, attention that is not fused."""
    config = architecture.model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    sizes = [getattr(config, name, None) or 0 for name in ("head_dim", "v_head_dim", "qk_head_dim")]
    head_dim = max(config.hidden_size // heads, *sizes)
    top_k = max(layer.top_k for layer in architecture.layers)
    kv_cache = 2 * config.num_hidden_layers * kv_heads * head_dim * context * sequences
    transients = prompt * (config.hidden_size * (2 * top_k + 16) + 4 * heads * context) + config.vocab_size
    return Footprint(kv_cache * dtype.itemsize, transients * dtype.itemsize, exact=False)


@contextlib.contextmanager
def _no_experts(architecture: Architecture) -> Iterator[None]:
    """While this context lasts experts allocate what the engine does for them, and compute nothing."""

    def run(hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        outputs = flat.new_empty(top_k_index.numel(), flat.shape[1])
        total, rank = torch.empty_like(flat), torch.empty_like(flat)
        del outputs, rank
        return total.view(hidden.shape)

    modules = [architecture.model.get_submodule(layer.name) for layer in architecture.layers]
    try:
        for module in modules:
            module.forward = run
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = _run(func, args, kwargs or {})
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self._note(
                    value.untyped_storage(), {id(t.untyped_storage()) for t in args if isinstance(t, torch.Tensor)}
                )
        return result

    def _note(self, storage: torch.UntypedStorage, inputs: set[int]) -> None:
        key = id(storage)
        if key in self._known or key in inputs:
            return
        nbytes = storage.nbytes()

        def end(_: object) -> None:
            self.bytes -= nbytes
            del self._known[key]

        self._known[key] = weakref.ref(storage, end)
        self.bytes += nbytes
        self.peak = max(self.peak, self.bytes)


def _run(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What depends on values chooses as much as there can be."""
    aten = torch.ops.aten
    if func is aten.nonzero.default:
        return args[0].new_empty(args[0].numel(), args[0].dim(), dtype=torch.long)
    if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
    return func(*args, **kwargs)


def _places(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    """A mask as an index of each of its dimensions."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [index.new_empty(index.numel(), dtype=torch.long)] * index.dim()


class _Attention(TorchFunctionMode):
    """Attention allocates what PyTorch's fused kernels do; its own rule on the meta device is the unfused one."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return _attention(*args, **(kwargs or {}))


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    mask = (
        None if attn_mask is None or attn_mask.dtype != torch.bool else torch.empty_like(attn_mask, dtype=query.dtype)
    )
    if query.shape[-1] != value.shape[-1]:  # no fused kernel
        scores = query.new_empty(*query.shape[:-1], key.shape[-2])
        torch.empty_like(scores)
        del scores
    del mask
    return query.new_empty(*query.shape[:-1], value.shape[-1])
