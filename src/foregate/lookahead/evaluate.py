"""How well gates foresee the experts of a trace, beside guesses that need no training and a probe that need not guess.

Every method is judged on the same rows. What the baselines learn, they learn from rows that are not judged: the first
half of each text's sequences, or another trace.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from foregate.checkpoint.source import GATES_FILE
from foregate.checkpoint.store import Store
from foregate.config import AlignConfig, EngineConfig, EvaluateGatesConfig, TraceConfig
from foregate.errors import ForegateError
from foregate.kernels import set_threads
from foregate.lookahead.evaluation import GateEvaluation
from foregate.lookahead.gates import LookaheadGates
from foregate.lookahead.judge import Fitted, Judge, TalliedTarget, divided, groups
from foregate.lookahead.samples import gate_layers
from foregate.lookahead.scores import merged, scores_of
from foregate.lookahead.trace import Trace

Progress = Callable[[int, int], None]  # (sources done, sources in all)


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
    fit_rows, judged = divided(trace, max_tokens, everything=fit is not None)
    fit_trace = fit or trace
    fit_rows = torch.arange(fit_trace.num_tokens) if fit else fit_rows
    judge = Judge(trace, gates, horizon, judged, Fitted(fit_trace, fit_rows))
    sources = range(len(trace.layers) + 1)
    tallies: list[TalliedTarget] = []
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
        groups=tuple(groups(tallies)),
        texts={
            name: scores_of(merged(tallied.by_text[index] for tallied in tallies if index in tallied.by_text))
            for index, name in enumerate(names)
        },
        cells=tuple(tallied.cell(names) for tallied in tallies),
    )


def _text_names(trace: Trace) -> list[str]:
    """Names of the texts; those of the same file name are numbered."""
    names: list[str] = []
    for text in trace.texts:
        count = sum(text.name == other.name for other in trace.texts[: len(names)])
        names.append(f"{text.name} ({count + 1})" if count else text.name)
    return names


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
