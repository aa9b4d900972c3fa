"""Every family: what runs from the store is what transformers runs from the checkpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import foregate

PRESENT = [family for family in FAMILIES if family in CONFIG_MAPPING]
SETTINGS = [(memory, policy) for memory in ("smallest", "50%", "100%") for policy in ("lru", "demand")]


def test_enough_families_are_tested() -> None:
    assert len(PRESENT) >= 20


@pytest.mark.parametrize("family", PRESENT)
def test_same_logits_and_greedy_tokens_as_transformers(
    family: str, checkpoint: Callable[[str], Path], store: Callable[[str], Path]
) -> None:
    reference = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32).eval()
    ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with torch.inference_mode():
        logits, tokens = reference(ids).logits, reference.generate(ids[:1], **options)
    for memory, policy in SETTINGS:
        model = foregate.load(store(family), memory=smallest_budget(store(family), memory), policy=policy)
        with torch.inference_mode():
            torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-5)
            assert torch.equal(model.generate(ids[:1], **options), tokens)
        model.foregate.scheduler.check_integrity()
        model.foregate.close()


def smallest_budget(store: Path, memory: str) -> str:
    """Replace "smallest" by the share that holds exactly one layer's top-k."""
    if memory != "smallest":
        return memory
    opened = foregate.checkpoint.store.Store(store)
    return f"{100 * opened.top_k / opened.num_experts}%"
