"""The loaded model is an ordinary transformers model: generate, batches, sampling, streaming, templates, pipelines."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer, pipeline

import foregate
from foregate.errors import ForegateError
from foregate.model.generate import generate, load_tokenizer


@pytest.fixture(scope="module")
def model(store: Callable[[str], Path]) -> Iterator[PreTrainedModel]:
    model = foregate.load(store("mixtral"), memory="25%")
    yield model
    model.foregate.close()


@pytest.fixture(scope="module")
def original(checkpoint: Callable[[str], Path]) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint("mixtral"), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(store: Callable[[str], Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(store("mixtral")))


@pytest.mark.parametrize(
    "options", [{"do_sample": False}, {"do_sample": True, "top_p": 0.9}, {"num_beams": 3, "do_sample": False}]
)
def test_generate_in_batches(model: PreTrainedModel, original: PreTrainedModel, options: dict) -> None:
    ids = torch.randint(3, 250, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # left padding
    results = []
    for candidate in (model, original):
        torch.manual_seed(0)
        results.append(candidate.generate(ids, attention_mask=mask, max_new_tokens=10, **options))
    assert torch.equal(*results)


def test_pipeline(model: PreTrainedModel, original: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [
        pipeline("text-generation", model=m, tokenizer=tokenizer)("Hello", max_new_tokens=8, do_sample=False)
        for m in (model, original)
    ]
    assert texts[0] == texts[1]
    assert texts[0][0]["generated_text"].startswith("Hello")


def test_chat_template_and_streamer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_tensors="pt", return_dict=True)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    output = model.generate(**ids, max_new_tokens=8, do_sample=False, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(output[0, ids["input_ids"].shape[1] :])


def test_our_generate_streams_the_text_it_returns(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    pieces: list[str] = []
    result = generate(model, tokenizer, "once upon", max_new_tokens=20, emit=pieces.append)
    assert "".join(pieces) == result.text
    assert result.new_tokens <= 20
    assert result.prompt_tokens == len("once upon")
    assert result.first_token_seconds > 0


def test_sampling_follows_the_seed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    options = {"max_new_tokens": 16, "temperature": 1.5}
    one, again, other = (generate(model, tokenizer, "a", seed=seed, **options).text for seed in (1, 1, 2))
    assert one == again != other


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("", {}),
        ("a", {"max_new_tokens": 0}),
        ("a", {"temperature": -1.0}),
        ("a", {"top_p": 0.0}),
        ("a", {"top_p": 1.5}),
    ],
)
def test_settings_out_of_range(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, options: dict
) -> None:
    with pytest.raises(ForegateError):
        generate(model, tokenizer, prompt, **options)


def test_no_expert_weight_is_in_the_model(model: PreTrainedModel, original: PreTrainedModel) -> None:
    names = {name for name, _ in model.named_parameters()}
    assert names == {name for name, _ in original.named_parameters() if ".experts." not in name}
