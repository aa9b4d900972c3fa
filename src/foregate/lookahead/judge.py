"""Every method at work on the rows of a trace: what gates, baselines and probe say, counted by target and text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from foregate.errors import ForegateError
from foregate.lookahead.baselines import CHUNK_ROWS, Probe, by_next_router, by_previous_token, fit_probe, frequencies
from foregate.lookahead.evaluation import Cell, Group
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
    Tallies,
    Tally,
    merged,
    scores_of,
)
from foregate.lookahead.trace import Trace


@dataclass
class TalliedTarget:
    """One target of one source, while it is counted."""

    source: str
    horizon: int
    target: Target
    from_token: bool  # whether the source is a token's embedding
    by_text: dict[int, Tallies] = field(default_factory=dict)

    @property
    def whole(self) -> Tallies:
        """Over all texts."""
        return merged(self.by_text.values())

    @property
    def kind(self) -> str:
        """What lies between source and target: "in token", "next token" or "from token"."""
        return "from token" if self.from_token else "next token" if self.target.next_token else "in token"

    def cell(self, names: Sequence[str]) -> Cell:
        """The figures; names: of the texts."""
        texts = {
            names[text]: {method: tally.recall[0].value for method, tally in tallies.items()}
            for text, tallies in self.by_text.items()
        }
        return Cell(self.source, self.horizon, *self.target, scores_of(self.whole), texts)


class Fitted:
    """What the baselines take from rows that are not judged. A layer's probe is fitted when it is first asked for."""

    def __init__(self, trace: Trace, rows: torch.Tensor) -> None:
        self._trace, self._rows = trace, rows
        self.frequencies = frequencies(trace, rows)
        self._probes: dict[int, Probe] = {}

    def probe(self, layer: int) -> Probe:
        """The probe of a MoE layer."""
        if layer not in self._probes:
            self._probes[layer] = fit_probe(self._trace, layer, self._rows)
        return self._probes[layer]


class Judge:
    """Runs every method over the judged rows (bool [tokens]), one source at a time and some rows at a time."""

    def __init__(
        self, trace: Trace, gates: LookaheadGates | None, horizon: int, judged: torch.Tensor, fitted: Fitted
    ) -> None:
        self.trace, self.gates, self.judged, self.fitted = trace, gates, judged, fitted
        self.routers = router_weights(trace)
        self.header = GatesHeader(gate_layers(trace), trace.header.embedding_size, horizon, 0, {})

    @torch.inference_mode()
    def source(self, source: int) -> list[TalliedTarget]:
        """Every method's counts for each target of a source, nearest first."""
        samples = SourceSamples(self.trace, source, self.header.horizon)
        name, from_token = self.header.source_name(source), source == len(self.trace.layers)
        tallied = [TalliedTarget(name, n, target, from_token) for n, target in enumerate(samples.targets, 1)]
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


def untrained_of(trace: Trace, source: int, horizon: int) -> LookaheadGate:
    """The gate of `source` before alignment, without an MLP."""
    layers, input_size = gate_layers(trace), SourceSamples(trace, source, horizon).input_size
    return untrained_gate(layers, router_weights(trace), source, horizon, 0, input_size)


def divided(trace: Trace, max_tokens: int, everything: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows to fit on, int64; whether a row is judged, bool [tokens]); with `everything` all of them are judged.

    Raises ForegateError on a trace too short to divide.
    """
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


def groups(tallies: list[TalliedTarget]) -> Iterable[Group]:
    """The figures by kind of target and horizon."""
    for kind in ("in token", "next token", "from token"):
        for horizon in sorted({item.horizon for item in tallies}):
            members = [item for item in tallies if (item.kind, item.horizon) == (kind, horizon)]
            if members:
                yield Group(kind, horizon, len(members), scores_of(merged(item.whole for item in members)))
