"""How well a model predicts a text: perplexity and bits per byte over overlapping windows."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foregate.config import EvaluateConfig
from foregate.errors import ForegateError


@dataclass(frozen=True)
class Evaluation:
    """The result on one text."""

    text: str
    bytes: int
    tokens: int
    nats: float  # over all tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean loss in nats per token; depends on the tokenizer."""
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Loss in bits over the text's bytes; comparable between tokenizers, and with a compressor."""
        return self.nats / math.log(2) / self.bytes


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: Path,
    *,
    window: int = EvaluateConfig.window,
    stride: int = EvaluateConfig.stride,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Loss of the model on a text file, every token predicted once.

    Windows of `window` tokens move on by `stride`, so that a token after the first window sees at least window - stride
    tokens before it. A tokenizer that begins texts with a special token does so at the start of every window. Raises
    ForegateError when the file is unreadable, not UTF-8 or empty, or the window does not suit the model.
    """
    check_window(model, window)
    if not 1 <= stride < window:
        raise ForegateError(f"--stride {stride}: from 1 to below the window of {window} tokens is needed")
    text = read_text(file)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    prefix = torch.tensor(tokenizer("")["input_ids"], dtype=ids.dtype)
    if len(prefix) + len(ids) < 2:
        raise ForegateError(f"{file} is too short: at least two tokens are needed")
    nats, predicted = 0.0, 0
    for start, end, first in _windows(len(ids), window - len(prefix), stride):
        inputs = torch.cat([prefix, ids[start:end]])
        with torch.inference_mode():
            logits = model(inputs[None].to(model.device), logits_to_keep=end - first + 1, use_cache=False).logits[
                0, :-1
            ]
        targets = ids[first:end][-len(logits) :]
        nats += functional.cross_entropy(logits.float().cpu(), targets, reduction="sum").item()
        predicted += len(targets)
        progress(end, len(ids))
    return Evaluation(str(file), len(text.encode()), predicted, nats)


def _windows(tokens: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first token to predict) of each window."""
    end, first = min(length, tokens), 0
    while first < tokens:
        yield max(0, end - length), end, first
        first, end = end, min(end + stride, tokens)


def read_text(file: Path) -> str:
    """A text file's content. Raises ForegateError when it is unreadable, not UTF-8 or empty."""
    try:
        text = file.read_bytes().decode()
    except OSError as error:
        raise ForegateError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ForegateError(f"{file} is not UTF-8 text (byte {error.start}): convert it first") from None
    if not text:
        raise ForegateError(f"{file} is empty: give a file with text")
    return text


def check_window(model: PreTrainedModel, window: int) -> None:
    """Raise ForegateError when the model's context does not hold `window` tokens."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and window > limit:
        raise ForegateError(f"--window {window} is longer than the model's context of {limit} tokens")
