"""Long prompts in pieces: the same text, in passes of bounded size, on the CPU and on a device."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import foregate
from foregate.model.generate import generate, load_tokenizer
from foregate.model.prompt import piece_size, takes_pieces

PROMPT = "In the beginning God created the heaven and the earth. " * 3  # one token a byte in tiny models


@pytest.mark.parametrize("device", ["cpu", "simulated"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h", "deepseek_v3"])
def test_a_prompt_in_pieces_gives_the_same_text(family: str, device: str, store: Callable[[str], Path]) -> None:
    model = foregate.load(store(family), memory="50%", device=device, threads=1)
    tokenizer, sizes, real = load_tokenizer(str(store(family))), [], model.foregate.run_layer

    def watched(layer: int, hidden: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        return real(layer, hidden, *rest)

    model.foregate.run_layer = watched
    whole = generate(model, tokenizer, PROMPT, max_new_tokens=8)
    assert max(sizes) == whole.prompt_tokens
    sizes.clear()
    pieces = generate(model, tokenizer, PROMPT, max_new_tokens=8, prompt_piece=50)
    assert max(sizes) == 50
    assert pieces.text == whole.text
    model.foregate.close()


def test_a_family_that_does_not_go_on_from_a_cache_by_several_tokens_is_found(store: Callable[[str], Path]) -> None:
    for family, takes in (("minimax", False), ("jamba", False), ("olmoe", True)):
        model = foregate.load(store(family), memory="50%", threads=1)
        assert takes_pieces(model) is takes, family
        assert piece_size(model, 60, 50) == (50 if takes else None)
        assert piece_size(model, 50, 50) is None
        assert not model.foregate.recorder.totals().misses
        model.foregate.close()
