"""Generating text with timing: transformers' own `generate`, watched by a streamer."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoTokenizer, BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from foregate.config import GenerateConfig
from foregate.errors import ForegateError, first_line
from foregate.model.prompt import piece_size


@dataclass(frozen=True)
class Generation:
    """One generated text and how long it took."""

    text: str
    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float  # from the call to the first new token: the prompt's pass
    decode_seconds: float  # from the first new token to the last


class _TimedStreamer(TextStreamer):
    """Passes finished words on and notes when tokens came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, emit: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._emit = emit
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._emit(text)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a model folder. Raises ForegateError when there is none."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever the tokenizer's own parsers raise
        raise ForegateError(f"{path} has no tokenizer that transformers can read: {first_line(error)}") from None


def count_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> int:
    """How many tokens a prompt has. Raises ForegateError for one that is empty or no text."""
    return _encode(tokenizer, prompt, None)["input_ids"].shape[-1]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = GenerateConfig.max_new_tokens,
    temperature: float = GenerateConfig.temperature,
    top_p: float = GenerateConfig.top_p,
    seed: int = GenerateConfig.seed,
    prompt_piece: int = GenerateConfig.prompt_piece,
    start: Callable[[], None] = lambda: None,
    emit: Callable[[str], None] = lambda text: None,
) -> Generation:
    """Continue `prompt`, passing text to `emit` as it comes; `start` is called when all checks have passed. Temperature 0 is greedy; otherwise `seed` decides.

    A prompt of more than `prompt_piece` tokens is computed in pieces of so many, where the family takes it. Raises ForegateError for an empty prompt or settings out of range.
    """
    check_settings(max_new_tokens, temperature, top_p, seed)
    inputs = _encode(tokenizer, prompt, getattr(model.config.get_text_config(), "max_position_embeddings", None))
    streamer = _TimedStreamer(tokenizer, emit)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    cache = {} if model.foregate.backbone is None else {"cache_implementation": "static", "disable_compile": True}
    prompt_tokens = inputs["input_ids"].shape[1]
    pieces = piece_size(model, prompt_tokens, prompt_piece)
    set_seed(seed)
    start()
    began = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs["input_ids"].to(model.device),
            attention_mask=inputs["attention_mask"].to(model.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=streamer,
            prefill_chunk_size=pieces,
            num_beams=1,  # a store's own defaults may ask for beams, which cannot be streamed
            **sampling,
            **cache,
        )
    return Generation(
        text=tokenizer.decode(output[0, prompt_tokens:], skip_special_tokens=True),
        prompt_tokens=prompt_tokens,
        new_tokens=output.shape[1] - prompt_tokens,
        first_token_seconds=streamer.times[0] - began,
        decode_seconds=streamer.times[-1] - streamer.times[0],
    )


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, limit: int | None) -> BatchEncoding:
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ForegateError("the prompt is not UTF-8 text: convert it first") from None
    inputs = tokenizer(prompt, return_tensors="pt", verbose=False)
    count = inputs["input_ids"].shape[-1]
    if not count:
        raise ForegateError("the prompt is empty: give at least one character")
    if limit and count >= limit:
        raise ForegateError(f"the prompt has {count} tokens and the model's context holds {limit}: shorten it")
    return inputs


def check_settings(max_new_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    """Raise ForegateError, naming the option, for settings out of range."""
    if max_new_tokens < 1:
        raise ForegateError(f"--max-new-tokens {max_new_tokens}: at least 1 is needed")
    if not 0 <= temperature < float("inf"):
        raise ForegateError(f"--temperature {temperature:g}: 0 (greedy) or above is needed")
    if not 0 <= seed < 2**32:
        raise ForegateError(f"--seed {seed}: a number from 0 to {2**32 - 1} is needed")
    if not 0 < top_p <= 1:
        raise ForegateError(f"--top-p {top_p:g}: a share above 0 and at most 1 is needed")
