"""Alignment: the lookahead gates of a model, trained source by source from a trace.

Work happens in `lookahead.partial` inside the store: an alignment that was killed goes on after the last source its
journal names. The gates appear in one step at the end.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from foregate import __version__
from foregate.checkpoint.source import GATES_FILE
from foregate.checkpoint.store import Store
from foregate.checkpoint.workspace import PartialFolder, io_error
from foregate.config import AlignConfig, EngineConfig, TraceConfig
from foregate.errors import ForegateError
from foregate.kernels import set_threads
from foregate.lookahead.fit import FittedGate, fit_gate
from foregate.lookahead.gate import LookaheadGate, untrained_gate
from foregate.lookahead.gates import GatesHeader, LookaheadGates
from foregate.lookahead.reuse import ReuseHead, fit_reuse_head
from foregate.lookahead.samples import SourceSamples, gate_layers, router_weights
from foregate.lookahead.trace import Trace

LARGEST_WIDTH = 4096
MAX_THREADS = 256
WIDTH_STEP = 4


@dataclass(frozen=True)
class AlignedSource:
    """How the gate of one source does on the validation rows, by target, nearest first."""

    name: str
    top_k: tuple[int, ...]
    untrained_recall: tuple[float, ...]
    recall: tuple[float, ...]
    calibration_error: tuple[float, ...]
    epoch: int


Progress = Callable[[int, int], None]  # (tokens recorded, tokens in all)
Report = Callable[[AlignedSource, int, int], None]  # (source, sources done, sources in all)


def align(
    store: str | Path,
    *,
    texts: Sequence[str | Path] = (),
    trace: str | Path | None = None,
    horizon: int = AlignConfig.horizon,
    width: int | None = AlignConfig.width,
    max_tokens: int = AlignConfig.max_tokens,
    device: str = AlignConfig.device,
    threads: int = EngineConfig.threads,
    window: int = TraceConfig.window,
    memory: str = EngineConfig.memory,
    scratch: str | Path | None = None,
    announce: Callable[[str], None] | None = None,
    recording: Progress | None = None,
    report: Report | None = None,
) -> Path:
    """Train the lookahead gates of a store's model; returns the path of the file, which replaces older gates.

    texts: UTF-8 files that the model reads first, with experts in `memory`, in windows of `window` tokens; their trace
    is kept in the folder `scratch` (None: where the store lies) until the gates are done. trace: a trace of this model
    that is there already; the model is then not loaded. max_tokens: of texts or trace; 0 is no limit. width: of the
    gates' MLPs; None fits them into AlignConfig.share of the backbone's parameters. device: "cpu", "cuda" or "auto".
    threads: that compute; 0 is one per core. announce hears what will be done, recording how far the trace is, report
    what came of each gate. Run again after an interruption, it resumes.
    Raises ForegateError on texts, traces or settings it cannot use, and on lack of disk space.
    """
    opened = Store(store)
    if bool(texts) == (trace is not None):
        raise ForegateError("gates are trained from texts or from a trace: name either --text or --trace")
    settings = replace(AlignConfig(), horizon=horizon, width=width, max_tokens=max_tokens, device=device)
    chosen_device = _check_settings(settings, len(opened.layers))
    if not 0 <= threads <= MAX_THREADS:
        raise ForegateError(f"threads={threads}: 0 (one per core) to {MAX_THREADS} are possible")
    if threads:
        set_threads(threads)
    announce, report = announce or (lambda line: None), report or (lambda source, done, total: None)
    if trace is not None:
        return _align(opened, Trace(trace), settings, chosen_device, announce, report)
    with _recorded(opened, texts, settings, window, memory, threads, scratch, announce, recording) as recorded:
        return _align(opened, recorded, settings, chosen_device, announce, report)


def default_width(header: GatesHeader, backbone_parameters: int) -> int:
    """The widest MLP with which all gates learn at most AlignConfig.share of the backbone's parameters.

    A multiple of 4, at least 4 and at most AlignConfig.max_width. header: its own width is ignored.
    """
    most = AlignConfig.share * backbone_parameters
    without, one = (_learned_by_all(replace(header, width=width)) for width in (0, 1))
    width = int((most - without) / (one - without)) // WIDTH_STEP * WIDTH_STEP
    width = min(max(width, WIDTH_STEP), AlignConfig.max_width)
    while width > WIDTH_STEP and _learned_by_all(replace(header, width=width)) > most:  # reuse heads grow in steps
        width -= WIDTH_STEP
    return width


def _learned_by_all(header: GatesHeader) -> int:
    return sum(_learned(header, source) for source in range(len(header.layers) + 1))


def _learned(header: GatesHeader, source: int) -> int:
    """Parameters learned for a source: the gate's own and the factors folded into its base."""
    gate = header.new_gate(source)
    return gate.learned_parameters + len(gate.sizes) * header.input_size(source)


def _check_settings(settings: AlignConfig, layers: int) -> torch.device:
    if not 1 <= settings.horizon <= layers:
        raise ForegateError(
            f"--horizon {settings.horizon}: 1 to {layers} are possible, the number of the model's MoE layers"
        )
    if settings.width is not None and not 0 <= settings.width <= LARGEST_WIDTH:
        raise ForegateError(f"--width {settings.width}: 0 to {LARGEST_WIDTH} are possible")
    if settings.max_tokens < 0:
        raise ForegateError(f"--max-tokens {settings.max_tokens}: 0 (no limit) or above is needed")
    if settings.device not in ("cpu", "cuda", "auto"):
        raise ForegateError(f"--device {settings.device}: choose cpu, cuda or auto")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ForegateError("--device cuda: PyTorch finds no CUDA device here; choose cpu")
    return torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")


def _align(
    store: Store,
    trace: Trace,
    settings: AlignConfig,
    device: torch.device,
    announce: Callable[[str], None],
    report: Report,
) -> Path:
    trace.check_matches(store.layers)
    job = _Job(store, trace, settings, device)
    announce(job.summary)
    folder = _GatesFolder(_gates_folder(store), job.fingerprint, job.nbytes)
    try:
        with folder:
            job.run(folder, report)
            gates = job.assemble(folder)
            gates.save(store.path / GATES_FILE)
            shutil.rmtree(folder.path)
    except OSError as error:
        raise io_error(error, folder.destination, "write the gates of") from None
    return store.path / GATES_FILE


def _gates_folder(store: Store) -> Path:
    """What the folder of unfinished work is named after."""
    return store.path / Path(GATES_FILE).stem


class _GatesFolder(PartialFolder):
    """The folder of an alignment: its journal holds what came of every finished source."""

    job = "alignment"
    result = "alignment"

    @staticmethod
    def worth_resuming(journal: dict[str, Any]) -> bool:
        return bool(journal.get("sources"))


class _Job:
    """One alignment: fits the sources that the journal does not name."""

    def __init__(self, store: Store, trace: Trace, settings: AlignConfig, device: torch.device) -> None:
        self.store, self.trace, self.settings, self.device = store, trace, settings, device
        layers = gate_layers(trace)
        header = GatesHeader(layers, trace.header.embedding_size, settings.horizon, settings.width or 0, {})
        if settings.width is None:
            header = replace(header, width=default_width(header, trace.header.backbone_parameters))
        self.header, self.routers = header, router_weights(trace)
        self.sources = range(len(layers) + 1)
        _check_rows(self._samples(0))

    @property
    def summary(self) -> str:
        """What will be trained, in one line."""
        learned = _learned_by_all(self.header)
        share = learned / self.trace.header.backbone_parameters
        samples = self._samples(0)
        return (
            f"{len(self.sources)} gates of width {self.header.width}, horizon {self.header.horizon}: {learned:,} "
            f"parameters to learn ({share:.1%} of the backbone's) from {len(samples.training):,} tokens, "
            f"{len(samples.validation):,} held out"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the gates: as float32 while others are still trained, and as float16 in their file."""
        gates = (self.header.new_gate(source) for source in self.sources)
        return sum(parameter.numel() * (4 + 2) for gate in gates for parameter in gate.parameters())

    @property
    def fingerprint(self) -> str:
        """Changes whenever a resumed alignment would not continue the same work."""
        facts = [__version__, asdict(self.settings), self.device.type, self.header.to_json(), self._trace_facts()]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def run(self, folder: _GatesFolder, report: Report) -> None:
        results = folder.done.get("sources", [])
        for source in self.sources:
            if source >= len(results):
                fitted = self._fit(source)
                folder.write(_source_file(source), save(fitted.gate.state_dict()))
                results = [*results, asdict(self._described(source, fitted))]
                folder.finished(sources=results)
            report(AlignedSource(**results[source]), source + 1, len(self.sources))

    def assemble(self, folder: _GatesFolder) -> LookaheadGates:
        """All gates, as the folder holds them."""
        sources = folder.done["sources"]
        header = replace(self.header, trained={**self._trained(), "sources": sources})
        return LookaheadGates(header, [self._restored(folder.path / _source_file(n), n) for n in self.sources])

    def _samples(self, source: int) -> SourceSamples:
        return SourceSamples(self.trace, source, self.header.horizon, self.settings.max_tokens)

    def _fit(self, source: int) -> FittedGate:
        header = self.header
        gate = untrained_gate(
            header.layers, self.routers, source, header.horizon, header.width, header.input_size(source)
        )
        fitted = fit_gate(self._samples(source), gate, self.settings, self.device)
        if source < len(header.layers):
            fitted.gate.reuse = self._fit_reuse(source)
        return fitted

    def _fit_reuse(self, layer: int) -> ReuseHead:
        rows = self.settings.max_tokens or self.trace.num_tokens
        scores = self.trace.scores(layer)[:rows, : self.header.layers[layer].num_experts]
        inputs, chosen = self.trace.inputs(layer)[:rows], self.trace.chosen(layer)[:rows]
        return fit_reuse_head(inputs, scores, chosen, self.header.reuse_width, self.settings.seed + layer)

    def _described(self, source: int, fitted: FittedGate) -> AlignedSource:
        return AlignedSource(
            name=self.header.source_name(source),
            top_k=fitted.gate.top_k,
            untrained_recall=fitted.untrained_recall,
            recall=fitted.recall,
            calibration_error=fitted.calibration_error,
            epoch=fitted.epoch,
        )

    def _restored(self, file: Path, source: int) -> LookaheadGate:
        gate = self.header.new_gate(source)
        gate.load_state_dict(load_file(file))
        return gate.requires_grad_(False)

    def _trained(self) -> dict[str, Any]:
        """What the gates' file says about their training."""
        samples = self._samples(0)
        return {
            "trace": self._trace_facts(),
            "tokens": {"training": len(samples.training), "validation": len(samples.validation)},
            "loss": "log near",
            "epochs": self.settings.epochs,
            "seed": self.settings.seed,
        }

    def _trace_facts(self) -> dict[str, Any]:
        header = self.trace.header
        return {
            "sha256": hashlib.sha256(header.to_json().encode()).hexdigest(),
            "model_class": header.model_class,
            "bits": header.bits,
            "quantizer": header.quantizer,
            "window": header.window,
            "generated": header.generated,
            "texts": [{"name": text.name, "sha256": text.sha256} for text in header.texts],
        }


def _check_rows(samples: SourceSamples) -> None:
    if not len(samples.validation) or not len(samples.training):
        raise ForegateError(
            f"{samples.trace.path} is too short for gates: no text gives two sequences, one to learn from and one to judge "
            "by; use more text or a smaller --window"
        )


def _source_file(source: int) -> str:
    return f"source-{source:03}.safetensors"


@contextlib.contextmanager
def _recorded(
    store: Store,
    texts: Sequence[str | Path],
    settings: AlignConfig,
    window: int,
    memory: str,
    threads: int,
    scratch: str | Path | None,
    announce: Callable[[str], None],
    recording: Progress | None,
) -> Iterator[Trace]:
    """A trace of the texts, recorded now or by an earlier run; it goes when the work it was made for is done."""
    from foregate.lookahead.record import plan_trace, read_texts, record_trace
    from foregate.model.generate import load_tokenizer
    from foregate.model.loading import load

    folder = store.path.absolute().parent if scratch is None else Path(scratch).expanduser()
    path = folder / f"{store.path.absolute().name}.align-trace"
    read = read_texts(load_tokenizer(str(store.path)), [Path(text) for text in texts])
    model = load(store.path, memory=memory, threads=threads)
    try:
        plan = plan_trace(model, read, window=window, max_tokens=settings.max_tokens)
        if not path.exists():
            announce(
                f"recording {plan.header.num_tokens:,} tokens first: {plan.nbytes / 2**20:,.1f} MiB in {path}, removed "
                "when the gates are done"
            )
            record_trace(plan, path, recording)
        elif Trace(path).header != plan.header:
            raise ForegateError(f"{path} holds the trace of other texts or settings: remove it")
    finally:
        model.foregate.close()
    del model, plan
    try:
        yield Trace(path)
    except ForegateError:
        if not PartialFolder.path_for(_gates_folder(store)).exists():  # no gate is worth the trace any more
            shutil.rmtree(path)
        raise
    shutil.rmtree(path)
