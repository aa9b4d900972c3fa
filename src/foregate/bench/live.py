"""One live run: load a store, write after each prompt, count what happened while decoding, free everything again."""

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foregate.bench.host import ForeignLoad
from foregate.config import BenchConfig, EngineConfig
from foregate.engine import Engine
from foregate.errors import ForegateError
from foregate.lookahead.gates import LookaheadGates
from foregate.memory.process import return_unused_memory
from foregate.model.loading import load
from foregate.schedule import Route

PROMPTS = ("And the LORD said unto Moses,", "def read_header(path):", "Der Paketmanager")


TokenIds = Sequence[tuple[int, ...]]  # by prompt


@dataclass(frozen=True)
class Script:
    """What is written in every run: `tokens` after each prompt are measured, `warm_up` before them are not."""

    prompts: tuple[str, ...] = PROMPTS
    tokens: int = BenchConfig.tokens
    warm_up: int = BenchConfig.warm_up
    seed: int = BenchConfig.seed

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.warm_up < 0:
            raise ForegateError(f"--tokens {self.tokens}, --warm-up {self.warm_up}: at least 1 and 0 are needed")
        if not self.prompts:
            raise ForegateError("there is no prompt: give at least one")


@dataclass(frozen=True)
class Setting:
    """How the store is run."""

    name: str
    policy: str
    memory: str
    link_bandwidth: float | None = None  # bytes/s; None: as fast as it is
    gates: LookaheadGates | None = None  # None: what the policy takes by itself
    future: Sequence[Route] | None = None  # for the bounds
    placed: bool = False  # on a device: missed experts may be computed on the host, which rounds otherwise


@dataclass(frozen=True)
class Place:
    """Where the stores run; see `foregate.load`."""

    device: str = EngineConfig.device
    host_memory: str | None = EngineConfig.host_memory
    threads: int = EngineConfig.threads

    @property
    def on_device(self) -> bool:
        """Whether experts are computed elsewhere than in host memory."""
        return self.device != "cpu"


@dataclass
class Counts:
    """Counters of an engine; a difference of two is what happened in between."""

    seconds: float = 0.0
    tokens: int = 0
    hits: int = 0
    misses: int = 0
    bytes_moved: int = 0
    stall_seconds: float = 0.0
    kernel_seconds: float = 0.0
    link_seconds: float = 0.0
    prefetches_started: int = 0
    prefetches_in_time: int = 0
    prefetches_late: int = 0
    prefetches_wasted: int = 0

    def __sub__(self, other: "Counts") -> "Counts":
        return Counts(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Measurement:
    """What one run took and did while decoding, over all prompts."""

    counts: Counts
    token_ids: tuple[tuple[int, ...], ...]  # by prompt
    foreign_load: float | None
    prompt_tokens: int = 0  # of all prompts
    prompt_seconds: float = 0.0  # until their first tokens
    facts: dict[str, Any] = field(default_factory=dict)  # the policy's own

    @property
    def tokens_per_second(self) -> float:
        return self.counts.tokens / self.counts.seconds

    @property
    def hit_rate(self) -> float:
        return self.counts.hits / (self.counts.hits + self.counts.misses)

    @property
    def precision(self) -> float | None:
        """Of the prefetches whose fate is known, those that were used."""
        used = self.counts.prefetches_in_time + self.counts.prefetches_late
        known = used + self.counts.prefetches_wasted
        return used / known if known else None

    def to_json(self) -> dict[str, Any]:
        counts = {item.name: getattr(self.counts, item.name) for item in fields(Counts)}
        return {
            "tokens_per_second": self.tokens_per_second,
            **counts,
            "foreign_load": self.foreign_load,
            "prompt_tokens": self.prompt_tokens,
            "prompt_seconds": self.prompt_seconds,
            "facts": self.facts,
        }


def measure(
    store: Path,
    tokenizer: PreTrainedTokenizerBase,
    setting: Setting,
    script: Script,
    *,
    place: Place | None = None,
    allow_buffered: bool = False,
    watch: Callable[[PreTrainedModel, Callable[[], bool]], None] | None = None,
    forced: TokenIds | None = None,
) -> Measurement:
    """Run the script once. One model is in memory at a time: it is loaded here and freed at the end.

    watch: called with the loaded model and with what says whether tokens count now. forced: what is to be written
    whatever the model would sample, as settings that round differently must to be compared. Raises ForegateError for a
    setting that does not fit the store, and when reads would go through the page cache, unless `allow_buffered`.
    """
    place = place or Place()
    model = load(
        store,
        memory=setting.memory,
        policy=setting.policy,
        link_bandwidth=setting.link_bandwidth,
        gates=setting.gates,
        future=setting.future,
        threads=place.threads,
        device=place.device,
        host_memory=place.host_memory,
        exact=place.on_device and not setting.placed,
    )
    try:
        with closing(model.foregate):
            from_disk = not place.on_device or place.host_memory is not None
            if from_disk and not (model.foregate.direct_reads or allow_buffered):
                raise ForegateError(
                    f"{store}: this file system reads through the page cache, so this would not measure the disk: move "
                    f"the store, or allow it with --allow-buffered"
                )
            return _run(model, tokenizer, script, watch, forced)
    finally:
        del model
        gc.collect()
        return_unused_memory()


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    script: Script,
    watch: Callable[[PreTrainedModel, Callable[[], bool]], None] | None,
    forced: TokenIds | None,
) -> Measurement:
    writer = _Writer(model, script)
    if watch is not None:
        watch(model, lambda: writer.counting)
    foreign = ForeignLoad()
    prompts = [tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device) for prompt in script.prompts]
    texts = forced or [None] * len(prompts)
    token_ids = tuple(writer.write(ids, text) for ids, text in zip(prompts, texts, strict=True))
    return Measurement(
        writer.counts,
        token_ids,
        foreign.share(),
        sum(ids.shape[1] for ids in prompts),
        writer.prompt_seconds,
        model.foregate.scheduler.facts(),
    )


class _Writer:
    """Samples text from a model and sums up what happened between the warm-up and the last token of each prompt."""

    def __init__(self, model: PreTrainedModel, script: Script) -> None:
        self._model, self._script = model, script
        self.counts, self.counting, self.prompt_seconds = Counts(), False, 0.0

    def write(self, prompt_ids: torch.Tensor, forced: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """The new tokens after a prompt [1, tokens], or `forced` as if they had been sampled."""
        new_tokens = 1 + self._script.warm_up + self._script.tokens  # the first one comes from the prompt's pass
        torch.manual_seed(self._script.seed)
        self._written, self._began = 0, time.perf_counter()
        force = [] if forced is None else [_Force(prompt_ids.shape[1], forced)]
        with torch.inference_mode():
            ids = self._model.generate(
                prompt_ids,
                attention_mask=torch.ones_like(prompt_ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=True,
                temperature=BenchConfig.temperature,
                top_p=BenchConfig.top_p,
                num_beams=1,
                pad_token_id=0,
                logits_processor=force,
                stopping_criteria=[self._after_token],
            )
        return tuple(ids[0, prompt_ids.shape[1] :].tolist())

    def _after_token(self, ids: torch.Tensor, scores: torch.Tensor, **rest: object) -> torch.Tensor:
        """Called by transformers after every token; never stops it."""
        self._written += 1
        if self._written == 1:
            self.prompt_seconds += time.perf_counter() - self._began
        if self._written == 1 + self._script.warm_up:
            self.counting, self._before = True, read_counts(self._model.foregate)
        elif self._written == 1 + self._script.warm_up + self._script.tokens:
            self.counting, happened = False, read_counts(self._model.foregate) - self._before
            self.counts += replace(happened, tokens=self._script.tokens)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


class _Force:
    """A logits processor that leaves one token to choose."""

    def __init__(self, prompt_tokens: int, tokens: tuple[int, ...]) -> None:
        self._prompt_tokens, self._tokens = prompt_tokens, tokens

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        only = torch.full_like(scores, -torch.inf)
        only[:, self._tokens[ids.shape[1] - self._prompt_tokens]] = 0
        return only


def read_counts(engine: Engine) -> Counts:
    """The engine's counters now; tokens are not its business."""
    totals, prefetches = engine.recorder.totals(), engine.scheduler.prefetches
    return Counts(
        time.perf_counter(),
        0,
        totals.hits,
        totals.misses,
        engine.link.bytes_moved,
        totals.stall_seconds,
        totals.kernel_seconds,
        engine.link.busy_seconds,
        *astuple(prefetches),
    )
