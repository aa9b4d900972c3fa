"""Captured decode steps, on the simulated device: whole regions, the same logits, the same text.

A compiler that only captures stands for CUDA graphs.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import foregate
from foregate.model.generate import generate, load_tokenizer
from foregate.model.regions import Regions, can_be_captured

IDS = torch.randint(3, 250, (1, 12), generator=torch.Generator().manual_seed(3))


def logits(model: PreTrainedModel, tokens: int, **options: object) -> torch.Tensor:
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "output_logits": True}
    found = model.generate(IDS, max_new_tokens=tokens, return_dict_in_generate=True, **settings, **options)
    return torch.cat(found.logits)


@pytest.mark.parametrize("family", ["deepseek_v3", "jamba"])
def test_all_regions_are_captured_and_give_the_same_logits(family: str, store: Callable[[str], Path]) -> None:
    model = foregate.load(store(family), device="simulated", memory="50%", policy="lru", threads=1, exact=True)
    assert can_be_captured(model)
    expected = logits(model, 3)
    regions = Regions(model, backend="aot_eager")
    assert len(regions.by_name) > 3 * len(model.foregate.store.layers)
    found = logits(model, 3, cache_implementation="static", disable_compile=True)
    assert not [region.refused for region in regions.by_name.values() if region.refused]
    assert regions.note == f"{len(regions.by_name)} regions captured"
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    model.foregate.close()


def test_what_cannot_be_captured_runs_eagerly_and_is_named(store: Callable[[str], Path]) -> None:
    """A router that breaks the graph."""
    model = foregate.load(store("mixtral"), device="simulated", memory="50%", policy="lru", threads=1, exact=True)
    expected = logits(model, 3)
    router = model.model.layers[1].mlp.gate
    router.forward = lambda hidden, real=router.forward: (torch._dynamo.graph_break(), real(hidden))[1]
    regions = Regions(model, backend="aot_eager")
    found = logits(model, 3, cache_implementation="static", disable_compile=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert [name for name, region in regions.by_name.items() if region.refused] == ["model.layers.1.mlp.gate"]
    assert "1 eager, first model.layers.1.mlp.gate: " in regions.note
    model.foregate.close()


def test_routers_go_on_being_watched_and_the_text_is_the_same(store: Callable[[str], Path]) -> None:
    options = {"memory": "60%", "policy": "mixtral-offloading", "threads": 1, "exact": True}
    model = foregate.load(store("mixtral"), device="simulated", **options)
    tokenizer = load_tokenizer(str(store("mixtral")))
    expected = generate(model, tokenizer, "And God said", max_new_tokens=6).text
    started = model.foregate.scheduler.prefetches.started
    model.foregate.backbone = Regions(model, backend="aot_eager")
    assert generate(model, tokenizer, "And God said", max_new_tokens=6).text == expected
    assert model.foregate.scheduler.prefetches.started > started
    assert "15 regions captured" in model.foregate.device_facts["backbone"]
    model.foregate.close()
