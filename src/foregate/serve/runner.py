"""The model's passes: a prompt in chunks, one sequence at a time; then one token a step for all sequences together."""

from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, PreTrainedModel

from foregate.serve import caches, rows


@dataclass
class Progress:
    """How far one sequence is: its tokens, and how many of them its cache holds."""

    tokens: list[int]
    cached: int = 0
    cache: DynamicCache | None = None  # until it joins the others'

    @property
    def prompt_left(self) -> int:
        """Tokens that a prompt pass still has to take in."""
        return len(self.tokens) - self.cached


@dataclass
class Runner:
    """Runs a model loaded by `foregate.load` for several sequences. Not thread-safe: one thread owns it.

    The result for a sequence does not depend on the others: with attention by SDPA not in a single bit, otherwise up to
    the rounding of attention over padding. For a prompt of at most `chunk` tokens it is what `generate` computes.
    """

    model: PreTrainedModel
    chunk: int
    running: list[Progress] = field(default_factory=list)

    def __post_init__(self) -> None:
        rows.prepare(self.model)
        self._cache: DynamicCache | None = None
        self.joins = caches.can_join(self._new_cache())

    @torch.inference_mode()
    def advance_prompt(self, sequence: Progress, *, all_logits: bool = False) -> torch.Tensor:
        """Take in the next chunk of a prompt; logits [1, vocabulary] of its last token, or [chunk, vocabulary] of all."""
        start, end = sequence.cached, min(sequence.cached + self.chunk, len(sequence.tokens))
        sequence.cache = sequence.cache or self._new_cache()
        logits = self.model(
            input_ids=self._on_device([sequence.tokens[start:end]]),
            position_ids=self._on_device([list(range(start, end))]),
            past_key_values=sequence.cache,
            use_cache=True,
            logits_to_keep=end - start if all_logits else 1,
        ).logits[0]
        sequence.cached = end
        return logits.float().cpu()

    def join(self, sequence: Progress) -> None:
        """Let a sequence whose prompt is done take part in the steps."""
        own, sequence.cache = sequence.cache, None
        self._cache = caches.join([self._cache, own]) if self.running else own
        self.running.append(sequence)

    def leave(self, gone: list[Progress]) -> None:
        """End these running sequences; what they held is freed."""
        kept = [i for i, sequence in enumerate(self.running) if not any(sequence is other for other in gone)]
        if len(kept) == len(self.running):
            return
        self.running = [self.running[i] for i in kept]
        if self.running:
            caches.keep(self._cache, kept, max(sequence.cached for sequence in self.running))
        else:
            self._cache = None

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        """Take in the last token of every running sequence in one forward pass; logits [running, vocabulary]."""
        lengths = [sequence.cached + 1 for sequence in self.running]
        with rows.rows(lengths):
            logits = self.model(
                input_ids=self._on_device([[sequence.tokens[-1]] for sequence in self.running]),
                attention_mask=_padding_mask(lengths, self.model.device),
                position_ids=self._on_device([[length - 1] for length in lengths]),
                past_key_values=self._cache,
                use_cache=True,
            ).logits[:, -1]
        for sequence, length in zip(self.running, lengths, strict=True):
            sequence.cached = length
        return logits.float().cpu()

    def reset(self) -> None:
        """After an error in a pass: forget all sequences."""
        self.running, self._cache = [], None

    def _on_device(self, numbers: list[list[int]]) -> torch.Tensor:
        return torch.tensor(numbers, device=self.model.device)

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config.get_text_config(decoder=True))


def _padding_mask(lengths: list[int], device: torch.device) -> torch.Tensor | None:
    """1 where a row has a token, 0 where it is padded on the left, int64 [rows, longest]; None without padding."""
    longest = max(lengths)
    if min(lengths) == longest:
        return None
    return (torch.arange(longest)[None] >= longest - torch.tensor(lengths)[:, None]).long().to(device)
