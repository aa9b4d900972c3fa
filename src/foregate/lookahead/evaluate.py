"""How well gates foresee the experts of a trace, beside guesses that need no training and a probe that need not guess.

Every method is judged on the same rows. What the baselines learn, they learn from rows that are not judged: the first
half of each text's sequences, or another trace.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from foregate.checkpoint.source import GATES_FILE
from foregate.checkpoint.store import Store
from foregate.config import AlignConfig, EngineConfig, EvaluateGatesConfig, TraceConfig
from foregate.errors import ForegateError
from foregate.kernels import set_threads
from foregate.lookahead.baselines import CHUNK_ROWS, Probe, by_next_router, by_previous_token, fit_probe, frequencies
from foregate.lookahead.gate import LookaheadGate, Target, untrained_gate
from foregate.lookahead.gates import GatesHeader, LookaheadGates
from foregate.lookahead.samples import SourceSamples, gate_layers, router_weights
from foregate.lookahead.scores import (
    CEILING,
    FREQUENCY,
    GATE,
    METHODS,
    NEXT_ROUTER,
    PREVIOUS,
    UNTRAINED,
    Score,
    Tallies,
    Tally,
    merged,
    scores_of,
)
from foregate.lookahead.trace import Trace

FORMAT_VERSION = 1
DIGITS = 5  # of figures in JSON

Progress = Callable[[int, int], None]  # (sources done, sources in all)


@dataclass(frozen=True)
class Cell:
    """One target of one source."""

    source: str  # as in the gates' file
    horizon: int  # 1 is the next MoE layer
    layer: int  # the target
    next_token: bool  # whether it lies beyond the token boundary
    scores: dict[str, Score]  # by method
    recall_by_text: dict[str, dict[str, float | None]]  # by text and method


@dataclass(frozen=True)
class Group:
    """All targets of a kind together."""

    kind: str  # "in token", "next token" or "from token"
    horizon: int
    targets: int
    scores: dict[str, Score]


@dataclass(frozen=True)
class GateEvaluation:
    """The result of `evaluate_gates`. A method that some target cannot have is left out of its groups."""

    model_class: str
    num_layers: int
    num_experts: tuple[int, ...]  # by MoE layer
    top_k: tuple[int, ...]
    trace: dict[str, Any]  # tokens judged, bits and quantizer of the experts that ran, texts
    fitted_on: str  # what frequencies and ceiling were taken from
    gates: dict[str, Any] | None  # what the gates' file says; None: there were none
    horizon: int
    seen_in_training: tuple[str, ...]  # texts the gates were trained on: figures on them say little
    overall: dict[str, Score]
    groups: tuple[Group, ...]
    texts: dict[str, dict[str, Score]]  # over all targets
    cells: tuple[Cell, ...]

    def to_json(self) -> str:
        """One JSON object; its layout is that of the dataclasses, `version` says which."""
        return json.dumps({"version": FORMAT_VERSION, **_rounded(asdict(self))}, indent=1)


def evaluate_gates(
    store: str | Path,
    *,
    texts: Sequence[str | Path] = (),
    trace: str | Path | None = None,
    gates: str | Path | None = None,
    fit: str | Path | None = None,
    max_tokens: int | None = None,
    window: int = TraceConfig.window,
    memory: str = EngineConfig.memory,
    threads: int = EngineConfig.threads,
    scratch: str | Path | None = None,
    announce: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda done, total: None,
) -> GateEvaluation:
    """Judge the lookahead gates of a store on held-out texts, or on a trace of them.

    texts: UTF-8 files that the model reads first, with experts in `memory`, in windows of `window` tokens; their trace
    is kept in the folder `scratch` (None: where the store lies) while it is needed. trace: a trace of this model that is
    there already; the model is then not loaded. gates: their file; None takes the store's own, and without any judges
    the baselines and untrained gates alone. fit: a trace that frequencies and ceiling are taken from; None takes the
    first half of each text's sequences, and only the others are judged. max_tokens: of texts or trace; 0 is no limit,
    None EvaluateGatesConfig.max_tokens for texts and no limit for a trace.
    Raises ForegateError on texts, traces, gates or settings it cannot use.
    """
    opened = Store(store)
    if bool(texts) == (trace is not None):
        raise ForegateError("gates are judged on texts or on a trace: name either --text or --trace")
    if max_tokens is None:
        max_tokens = EvaluateGatesConfig.max_tokens if texts else 0
    if max_tokens < 0:
        raise ForegateError(f"--max-tokens {max_tokens}: 0 (no limit) or above is needed")
    found = _find_gates(opened, gates)
    fit_trace = None if fit is None else Trace(fit)
    if threads:
        set_threads(threads)
    with contextlib.ExitStack() as stack:
        if trace is not None:
            judged = Trace(trace)
        else:
            recorded = _recorded(opened, texts, max_tokens, window, memory, threads, scratch, announce)
            judged = stack.enter_context(recorded)
        judged.check_matches(opened.layers)
        return judge_gates(judged, found, fit=fit_trace, max_tokens=max_tokens, progress=progress)


def judge_gates(
    trace: Trace,
    gates: LookaheadGates | None,
    *,
    fit: Trace | None = None,
    horizon: int | None = None,
    max_tokens: int = 0,
    progress: Progress = lambda done, total: None,
) -> GateEvaluation:
    """What `evaluate_gates` does, with everything opened. horizon: of untrained gates when there are no others."""
    if gates is None:
        horizon = horizon or min(AlignConfig.horizon, len(trace.layers))
    else:
        _check_sizes(gates, trace)
        horizon = gates.header.horizon
    if fit is not None and gate_layers(fit) != gate_layers(trace):
        raise ForegateError(f"--fit {fit.path} is the trace of another model: record one of this model")
    fit_rows, judged = _divided(trace, max_tokens, everything=fit is not None)
    fit_trace = fit or trace
    fit_rows = torch.arange(fit_trace.num_tokens) if fit else fit_rows
    judge = _Judge(trace, gates, horizon, judged, _Fitted(fit_trace, fit_rows))
    sources = range(len(trace.layers) + 1)
    tallies: list[_Tallied] = []
    for source in sources:
        progress(source, len(sources))
        tallies += judge.source(source)
    progress(len(sources), len(sources))
    names = _text_names(trace)
    fitted_on = (
        f"trace of {len(fit_rows):,} tokens"
        if fit
        else f"first half of each text's sequences, {len(fit_rows):,} tokens"
    )
    trained_on = {} if gates is None else {t["sha256"] for t in gates.header.trained.get("trace", {}).get("texts", ())}
    return GateEvaluation(
        model_class=trace.header.model_class,
        num_layers=len(trace.layers),
        num_experts=tuple(layer.num_experts for layer in trace.layers),
        top_k=tuple(layer.top_k for layer in trace.layers),
        trace={
            "tokens": int(judged.sum()),
            "bits": trace.header.bits,
            "quantizer": trace.header.quantizer,
            "window": trace.header.window,
            "generated": trace.header.generated,
            "texts": [{"name": text.name, "sha256": text.sha256} for text in trace.texts],
        },
        fitted_on=fitted_on,
        gates=gates and {"horizon": horizon, "width": gates.header.width, "trained": gates.header.trained},
        horizon=horizon,
        seen_in_training=tuple(text.name for text in trace.texts if text.sha256 in trained_on),
        overall=scores_of(merged(tallied.whole for tallied in tallies), bins=True),
        groups=tuple(_groups(tallies)),
        texts={
            name: scores_of(merged(tallied.by_text[index] for tallied in tallies if index in tallied.by_text))
            for index, name in enumerate(names)
        },
        cells=tuple(tallied.cell(names) for tallied in tallies),
    )


@dataclass
class _Tallied:
    """One target of one source, while it is counted."""

    source: str
    horizon: int
    target: Target
    from_token: bool  # whether the source is a token's embedding
    by_text: dict[int, Tallies] = field(default_factory=dict)

    @property
    def whole(self) -> Tallies:
        return merged(self.by_text.values())

    @property
    def kind(self) -> str:
        return "from token" if self.from_token else "next token" if self.target.next_token else "in token"

    def cell(self, names: Sequence[str]) -> Cell:
        texts = {
            names[text]: {method: tally.recall[0].value for method, tally in tallies.items()}
            for text, tallies in self.by_text.items()
        }
        return Cell(self.source, self.horizon, *self.target, scores_of(self.whole), texts)


class _Fitted:
    """What the baselines take from rows that are not judged. A layer's probe is fitted when it is first asked for."""

    def __init__(self, trace: Trace, rows: torch.Tensor) -> None:
        self._trace, self._rows = trace, rows
        self.frequencies = frequencies(trace, rows)
        self._probes: dict[int, Probe] = {}

    def probe(self, layer: int) -> Probe:
        if layer not in self._probes:
            self._probes[layer] = fit_probe(self._trace, layer, self._rows)
        return self._probes[layer]


class _Judge:
    """Runs every method over the judged rows, one source at a time and some rows at a time."""

    def __init__(
        self, trace: Trace, gates: LookaheadGates | None, horizon: int, judged: torch.Tensor, fitted: _Fitted
    ) -> None:
        self.trace, self.gates, self.judged, self.fitted = trace, gates, judged, fitted
        self.routers = router_weights(trace)
        self.header = GatesHeader(gate_layers(trace), trace.header.embedding_size, horizon, 0, {})

    @torch.inference_mode()
    def source(self, source: int) -> list[_Tallied]:
        samples = SourceSamples(self.trace, source, self.header.horizon)
        name, from_token = self.header.source_name(source), source == len(self.trace.layers)
        tallied = [_Tallied(name, n, target, from_token) for n, target in enumerate(samples.targets, 1)]
        untrained = untrained_of(self.trace, source, self.header.horizon)
        rows = samples.rows[self.judged[samples.rows]]
        texts = samples.text_of(rows)
        for text in texts.unique().tolist():
            for part in rows[texts == text].split(CHUNK_ROWS):
                answers = self._answers(samples, part, untrained)
                for item, chosen, methods in zip(tallied, samples.chosen(part), answers, strict=True):
                    own = item.by_text.setdefault(text, {method: Tally() for method in methods})
                    for method, (logits, probabilities) in methods.items():
                        own[method].add(logits, chosen, probabilities)
        return tallied

    def _answers(
        self, samples: SourceSamples, rows: torch.Tensor, untrained: LookaheadGate
    ) -> list[dict[str, tuple[torch.Tensor, torch.Tensor | None]]]:
        """For each target: what every method that applies says, logits and probabilities [rows, num_experts]."""
        source, recent = samples.source(rows), samples.recent(rows)
        named = (
            {UNTRAINED: untrained}
            if self.gates is None
            else {UNTRAINED: untrained, GATE: self.gates.gates[samples.source_index]}
        )
        outputs = {}
        for name, gate in named.items():
            logits = gate(source, recent)
            outputs[name] = list(zip(gate.split(logits), gate.probabilities(logits), strict=True))
        answers = []
        for index, (target, before) in enumerate(zip(samples.targets, samples.recent_chosen(rows), strict=True)):
            frequency = self.fitted.frequencies[target.layer]
            inputs = self.trace.inputs(target.layer)[rows + target.next_token].float()
            methods = {
                FREQUENCY: (frequency.expand(len(rows), -1), None),
                PREVIOUS: (by_previous_token(before, frequency), None),
                CEILING: (self.fitted.probe(target.layer).logits(inputs), None),
            }
            guess = by_next_router(source, self.routers[target.layer])
            if guess is not None:
                methods |= {NEXT_ROUTER: (guess, None), UNTRAINED: outputs[UNTRAINED][index]}
            if GATE in outputs:
                methods[GATE] = outputs[GATE][index]
            answers.append({method: methods[method] for method in METHODS if method in methods})
        return answers


def _text_names(trace: Trace) -> list[str]:
    """Names of the texts; those of the same file name are numbered."""
    names: list[str] = []
    for text in trace.texts:
        count = sum(text.name == other.name for other in trace.texts[: len(names)])
        names.append(f"{text.name} ({count + 1})" if count else text.name)
    return names


def untrained_of(trace: Trace, source: int, horizon: int) -> LookaheadGate:
    """The gate of `source` before alignment, without an MLP."""
    layers, input_size = gate_layers(trace), SourceSamples(trace, source, horizon).input_size
    return untrained_gate(layers, router_weights(trace), source, horizon, 0, input_size)


def _find_gates(store: Store, path: str | Path | None) -> LookaheadGates | None:
    """The gates of a file; without one named, the store's own or None."""
    if path is None and not (store.path / GATES_FILE).is_file():
        return None
    file = store.path / GATES_FILE if path is None else Path(path).expanduser()
    if not file.is_file():
        raise ForegateError(f"no such gates: {file}; train some with foregate align {store.path}")
    return LookaheadGates.load(file, store.layers)


def _check_sizes(gates: LookaheadGates, trace: Trace) -> None:
    sizes = [layer.input_size for layer in gates.header.layers] + [gates.header.embedding_size]
    if sizes != [layer.input_size for layer in trace.layers] + [trace.header.embedding_size]:
        raise ForegateError(
            f"the gates are of a model of another hidden size than {trace.path}: train gates for this one with "
            "foregate align"
        )


@contextlib.contextmanager
def _recorded(
    store: Store,
    texts: Sequence[str | Path],
    max_tokens: int,
    window: int,
    memory: str,
    threads: int,
    scratch: str | Path | None,
    announce: Callable[[str], None],
) -> Iterator[Trace]:
    """A trace of the texts, gone when the context ends."""
    from foregate.lookahead.record import plan_trace, read_texts, record_trace
    from foregate.model.generate import load_tokenizer
    from foregate.model.loading import load

    parent = store.path.absolute().parent if scratch is None else Path(scratch).expanduser()
    read = read_texts(load_tokenizer(str(store.path)), [Path(text) for text in texts])
    with tempfile.TemporaryDirectory(prefix=f"{store.path.name}.evaluate-", dir=parent) as folder:
        model = load(store.path, memory=memory, threads=threads)
        try:
            plan = plan_trace(model, read, window=window, max_tokens=max_tokens)
            announce(
                f"recording {plan.header.num_tokens:,} tokens first: {plan.nbytes / 2**20:,.1f} MiB in {folder}, removed "
                "at the end"
            )
            path = record_trace(plan, Path(folder) / "trace")
        finally:
            model.foregate.close()
        del model, plan
        yield Trace(path)


def _divided(trace: Trace, max_tokens: int, everything: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows to fit on, int64; whether a row is judged, bool [tokens]); with `everything` all of them are judged."""
    sequences = [s for s in trace.sequences if not max_tokens or s.start + s.length <= max_tokens]
    judged = torch.zeros(trace.num_tokens, dtype=torch.bool)
    fitted = torch.zeros(trace.num_tokens, dtype=torch.bool)
    for text in range(len(trace.texts)):
        own = [s for s in sequences if s.text == text]
        half = 0 if everything else len(own) // 2
        for number, sequence in enumerate(own):
            part = fitted if number < half else judged
            part[sequence.start : sequence.start + sequence.length] = True
    if not judged.any() or not (everything or fitted.any()):
        raise ForegateError(
            f"{trace.path} is too short to judge gates by: no text gives two sequences; use more text or a smaller window"
        )
    return fitted.nonzero().squeeze(1), judged


def _groups(tallies: list[_Tallied]) -> Iterable[Group]:
    for kind in ("in token", "next token", "from token"):
        for horizon in sorted({item.horizon for item in tallies}):
            members = [item for item in tallies if (item.kind, item.horizon) == (kind, horizon)]
            if members:
                yield Group(kind, horizon, len(members), scores_of(merged(item.whole for item in members)))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
