"""One reply in the making: what was asked for, how far it is, and the pieces it hands out."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foregate.serve.runner import Progress
from foregate.serve.sampling import Sampler, Sampling, TokenLogprob, token_logprob
from foregate.serve.text import TextStream

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Order:
    """What a reply shall be. `logprobs` is how many likeliest tokens are reported beside each; None reports nothing."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False  # report the prompt's tokens too, before the first piece of the reply


@dataclass(frozen=True)
class Piece:
    """Some more of a reply. The last piece has a reason or an error."""

    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    generated: int = 0  # tokens so far, an end-of-text token included
    finish_reason: FinishReason | None = None
    error: str | None = None

    @property
    def last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass
class Sequence:
    """A reply while the batcher works on it. `emit` is called with its pieces in the batcher's thread."""

    order: Order
    emit: Callable[[Piece], None]
    tokenizer: PreTrainedTokenizerBase
    end_tokens: frozenset[int]
    arrived: float = field(default_factory=time.perf_counter)
    cancelled: bool = False  # set by any thread
    generated: int = 0

    def __post_init__(self) -> None:
        self.progress = Progress(list(self.order.prompt))
        self._sampler = Sampler(self.order.sampling)
        self._text = TextStream(self.tokenizer, self.order.stops)
        self._logprobs: list[TokenLogprob] = []
        if self.order.prompt_logprobs:
            self._logprobs.append(TokenLogprob(self.tokenizer.decode([self.order.prompt[0]]), None, {}))

    def note_prompt(self, logits: torch.Tensor) -> None:
        """Report the prompt's tokens that these logits [chunk, vocabulary], just computed, foretell."""
        end = self.progress.cached
        following = self.order.prompt[end - logits.shape[0] + 1 : end + 1]
        for row, token in zip(logits, following, strict=False):  # the last one foretells the reply's first token
            self._logprobs.append(token_logprob(self.tokenizer, row, token, self.order.logprobs or 0))

    def advance(self, logits: torch.Tensor) -> Piece | None:
        """Choose the next token by logits [vocabulary]; what is certain now, or None when that is nothing yet."""
        if self.order.max_tokens == 0:
            return self._piece("", "length")
        token = self._sampler.choose(logits, self.progress.tokens)
        self.generated += 1
        if token in self.end_tokens:
            return self._piece(self._text.finish(), "stop")
        if self.order.logprobs is not None:
            self._logprobs.append(token_logprob(self.tokenizer, logits, token, self.order.logprobs))
        self.progress.tokens.append(token)
        text = self._text.push(token)
        full = self.generated == self.order.max_tokens
        if full:
            text += self._text.finish()
        return self._piece(text, "stop" if self._text.stopped else "length" if full else None)

    def _piece(self, text: str, reason: FinishReason | None) -> Piece | None:
        if not text and not self._logprobs and reason is None:
            return None
        piece = Piece(text, tuple(self._logprobs), self.generated, reason)
        self._logprobs.clear()
        return piece


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a text, as `generate` knows them."""
    end = model.generation_config.eos_token_id
    return frozenset() if end is None else frozenset([end] if isinstance(end, int) else end)
