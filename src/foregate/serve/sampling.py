"""From logits to a token, for one sequence: transformers' logits processors and a generator of its own."""

from dataclasses import dataclass

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

GREEDY_BELOW = 1e-4  # of temperature: logits divided by less may leave float32's range


@dataclass(frozen=True)
class Sampling:
    """How one sequence's tokens are chosen. A temperature of about 0 is greedy; top_k 0 is no limit; seed None is a random one."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @classmethod
    def of_request(
        cls, model: GenerationConfig, temperature: float | None, top_p: float | None, seed: int | None
    ) -> "Sampling":
        """What a request says; where it says nothing the model's own generation settings, then OpenAI's."""
        return cls(
            temperature=_first(temperature, model.temperature, 1.0),
            top_p=_first(top_p, model.top_p, 1.0),
            top_k=model.top_k or 0,
            repetition_penalty=_first(model.repetition_penalty, 1.0),
            seed=seed,
        )


class Sampler:
    """Chooses the tokens of one sequence. With a seed they do not depend on what other sequences draw."""

    def __init__(self, sampling: Sampling) -> None:
        self._greedy = sampling.greedy
        self._needs_tokens = sampling.repetition_penalty != 1
        self._processors = _processors(sampling)
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def choose(self, logits: torch.Tensor, tokens: list[int]) -> int:
        """The next token after `tokens`, from logits float32 [vocabulary]."""
        seen = torch.tensor([tokens if self._needs_tokens else []], dtype=torch.long)
        scores = self._processors(seen, logits[None].clone())[0]
        if self._greedy:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))


@dataclass(frozen=True)
class TokenLogprob:
    """A token's text and natural logarithm of its probability before temperature, and the likeliest ones', descending.

    The first token of a prompt, which nothing foretells, has no logprob.
    """

    token: str
    logprob: float | None
    top: dict[str, float]


def token_logprob(tokenizer: PreTrainedTokenizerBase, logits: torch.Tensor, token: int, top: int) -> TokenLogprob:
    """How likely `token` was by logits float32 [vocabulary], with the `top` likeliest tokens."""
    logprobs = logits.log_softmax(-1)
    likeliest: dict[str, float] = {}
    for value, index in zip(*(part.tolist() for part in logprobs.topk(min(top, len(logprobs)))), strict=True):
        likeliest.setdefault(tokenizer.decode([index]), value)  # pieces of characters may read alike
    return TokenLogprob(tokenizer.decode([token]), float(logprobs[token]), likeliest)


def _processors(sampling: Sampling) -> LogitsProcessorList:
    """In the order that `generate` applies them."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.greedy:
        return processors
    if sampling.temperature != 1:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k > 0:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(float(sampling.top_p)))
    return processors


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)
