"""KV caches of several sequences in one: rows of different lengths, padded on the left, that join and leave."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

JOINABLE = (DynamicLayer, DynamicSlidingWindowLayer)


def can_join(cache: DynamicCache) -> bool:
    """Whether every layer of `cache` holds keys and values only: recurrent states know no padding."""
    return all(type(layer) in JOINABLE for layer in cache.layers)


def join(caches: Sequence[DynamicCache]) -> DynamicCache:
    """One cache of all rows of `caches`, in order, as long as the longest. The first one is changed and returned."""
    joined = caches[0]
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        width = max(layer.keys.shape[-2] for layer in layers)
        layers[0].keys = torch.cat([_padded(layer.keys, width) for layer in layers])
        layers[0].values = torch.cat([_padded(layer.values, width) for layer in layers])
        if isinstance(layers[0], DynamicSlidingWindowLayer):
            layers[0].cumulative_length = max(layer.cumulative_length for layer in layers)
    return joined


def keep(cache: DynamicCache, rows: Sequence[int], length: int) -> None:
    """Keep these rows of `cache`, of which the longest has `length` tokens: more than that was padding."""
    index = torch.tensor(rows)
    for layer in cache.layers:
        start = max(0, layer.keys.shape[-2] - length)
        layer.keys = layer.keys[index, :, start:].contiguous()
        layer.values = layer.values[index, :, start:].contiguous()
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = length


def can_cut(cache: DynamicCache) -> bool:
    """Whether the cache can go back to fewer tokens: a sliding window has forgotten what came before it."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def cut(cache: DynamicCache, length: int) -> None:
    """Keep the first `length` tokens of every row."""
    for layer in cache.layers:
        layer.keys = layer.keys[..., :length, :].contiguous()
        layer.values = layer.values[..., :length, :].contiguous()


def _padded(states: torch.Tensor, width: int) -> torch.Tensor:
    return F.pad(states, (0, 0, width - states.shape[-2], 0))
