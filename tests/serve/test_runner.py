"""Sequences that share forward passes get what each of them would get alone."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import foregate
from foregate.model.generate import load_tokenizer
from foregate.serve.runner import Progress, Runner

Folder = Callable[[str], Path]


def prompts(count: int, longest: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 250) for _ in range(rng.randint(2, longest))] for _ in range(count)]


def alone(model, prompt: list[int], tokens: int) -> tuple[list[int], torch.Tensor]:
    """The slow, obvious way: transformers' own generate."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)


def together(runner: Runner, all_prompts: list[list[int]], tokens: int, seed: int) -> list[torch.Tensor]:
    """Sequences join one after the other, at random moments, and leave when they have `tokens`; their logits."""
    rng = random.Random(seed)
    waiting = [Progress(list(prompt)) for prompt in all_prompts]
    every, logits = list(waiting), {id(sequence): [] for sequence in waiting}

    def choose(sequence: Progress, row: torch.Tensor) -> None:
        logits[id(sequence)].append(row)
        sequence.tokens.append(int(row.argmax()))

    while waiting or runner.running:
        if waiting and (not runner.running or rng.random() < 0.5):
            sequence = waiting.pop(0)
            while sequence.prompt_left:
                row = runner.advance_prompt(sequence)[-1]
            choose(sequence, row)
            runner.join(sequence)
        for sequence, row in zip(list(runner.running), runner.step(), strict=True):
            choose(sequence, row)
        runner.leave([s for s in runner.running if len(logits[id(s)]) >= tokens])
    return [torch.stack(logits[id(sequence)]) for sequence in every]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_logits_are_those_of_generate_bit_for_bit_in_any_company(family: str, store: Folder) -> None:
    model = foregate.load(store(family), memory="50%")
    asked = prompts(7, 40, seed=1)
    expected = [alone(model, prompt, 9) for prompt in asked]
    for seed in range(2):
        results = together(Runner(model, chunk=64), asked, 9, seed)
        for logits, (tokens, wanted) in zip(results, expected, strict=True):
            assert logits.argmax(-1).tolist() == tokens
            assert torch.equal(logits, wanted)
    model.foregate.close()


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_sliding_windows_sinks_and_latents_up_to_rounding(family: str, store: Folder) -> None:
    model = foregate.load(store(family), memory="50%", exact=True)
    asked = prompts(5, 30, seed=2)
    results = together(Runner(model, chunk=64), asked, 12, seed=0)
    for logits, prompt in zip(results, asked, strict=True):
        tokens, wanted = alone(model, prompt, 12)
        assert logits.argmax(-1).tolist() == tokens
        torch.testing.assert_close(logits, wanted, atol=2e-5, rtol=1e-4)
    model.foregate.close()


def test_recurrent_states_are_served_one_at_a_time(store: Folder) -> None:
    model = foregate.load(store("nemotron_h"), memory="50%")
    runner = Runner(model, chunk=64)
    assert not runner.joins
    for prompt in prompts(2, 20, seed=3):
        (logits,) = together(runner, [prompt], 6, seed=0)
        assert logits.argmax(-1).tolist() == alone(model, prompt, 6)[0]
    model.foregate.close()


def test_a_prompt_in_chunks_gives_the_same_up_to_rounding(store: Folder) -> None:
    model = foregate.load(store("mixtral"), memory="50%")
    prompt = prompts(1, 100, seed=4)[0] * 2
    whole, chunks = Progress(list(prompt)), Progress(list(prompt))
    wanted = Runner(model, chunk=1000).advance_prompt(whole, all_logits=True)
    runner, parts = Runner(model, chunk=16), []
    while chunks.prompt_left:
        parts.append(runner.advance_prompt(chunks, all_logits=True))
    torch.testing.assert_close(torch.cat(parts), wanted, atol=1e-5, rtol=1e-4)
    model.foregate.close()


@pytest.mark.slow
@pytest.mark.parametrize("bits", [16, 4])
def test_the_demo_model_writes_the_same_text_in_any_company(bits: int, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    store = foregate.convert(root / "demo/qwen3-moe-tiny", tmp_path / "store", bits=bits)
    model, tokenizer = foregate.load(store, memory="25%", threads=1), load_tokenizer(str(store))
    lines = [line for text in sorted((root / "demo/text").glob("*.txt")) for line in text.read_text().splitlines()]
    asked = [tokenizer(line)["input_ids"][:60] for line in lines[:: len(lines) // 30] if len(line) > 20]
    results = together(Runner(model, chunk=512), asked, 60, seed=5)
    for logits, prompt in zip(results, asked, strict=True):
        assert torch.equal(logits, alone(model, prompt, 60)[1])
    model.foregate.close()
