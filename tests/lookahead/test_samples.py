"""Rows of a trace for a gate, against the definition, on a trace made by hand."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from foregate.errors import ForegateError
from foregate.lookahead import trace as traces
from foregate.lookahead.gate import token_source
from foregate.lookahead.samples import SourceSamples, hits
from foregate.lookahead.trace import Sequence, Trace, TraceHeader, TraceLayer, TraceText

LENGTHS, TEXTS = (4, 3, 4, 5, 1), (0, 1, 0, 0, 1)


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    layers = tuple(TraceLayer(f"l{n}", f"r{n}", 4, 2, 8, 8, 5, True) for n in range(3))
    starts = [sum(LENGTHS[:n]) for n in range(len(LENGTHS))]
    sequences = tuple(map(Sequence, starts, LENGTHS, TEXTS))
    texts = tuple(TraceText(name, "0", 1, 1) for name in "ab")
    header = TraceHeader("t", "T", 16, "none", 99, 6, 1000, 5, 0, layers, texts, sequences)
    (tmp_path / traces.HEADER_FILE).write_text(header.to_json())
    torch.manual_seed(0)
    for name, nbytes in header.files().items():
        values = torch.randn(nbytes // 2).to(torch.bfloat16)
        if name.startswith("chosen"):
            values = torch.randint(0, 4, (nbytes // 2,), dtype=torch.int16)
        (tmp_path / name).write_bytes(values.view(torch.uint8).numpy().tobytes())
    save_file({}, tmp_path / traces.ROUTERS_FILE)
    return Trace(tmp_path)


@pytest.mark.parametrize("source", range(4))
def test_rows_by_the_definition(trace: Trace, source: int) -> None:
    samples = SourceSamples(trace, source, 2)
    aims = [(0, 0), (1, 0)] if source == 3 else [((source + n) % 3, (source + n) // 3) for n in (1, 2)]
    wraps, rows = any(later for _, later in aims), samples.rows
    expected = [s.start + n for s in trace.sequences for n in range(s.length - wraps)]
    assert rows.tolist() == expected
    inputs = token_source(trace.embeddings) if source == 3 else trace.inputs(source).float()
    assert torch.equal(samples.source(rows), inputs[rows])
    recent, starts = samples.recent(rows).split(4, dim=1), {s.start for s in trace.sequences}
    for index, (layer, later) in enumerate(aims):
        for place, row in enumerate(expected):
            assert torch.equal(samples.scores(rows)[index][place], trace.scores(layer)[row + later, :4].float())
            assert torch.equal(samples.chosen(rows)[index][place], trace.chosen(layer)[row + later].long())
            seen = row if later else row - 1
            wanted = torch.zeros(4) if not later and row in starts else trace.scores(layer)[seen, :4].float()
            assert torch.equal(recent[index][place], wanted)


def test_the_last_sequences_of_each_text_are_held_out(trace: Trace) -> None:
    samples = SourceSamples(trace, 0, 1)
    assert samples.validation.tolist() == [11, 12, 13, 14, 15, 16]  # the fourth and fifth sequence
    assert sorted([*samples.training.tolist(), *samples.validation.tolist()]) == samples.rows.tolist()
    assert samples.text_of(torch.tensor([0, 4, 6, 7, 15, 16])).tolist() == [0, 1, 1, 0, 0, 1]


def test_limits(trace: Trace) -> None:
    assert SourceSamples(trace, 0, 1, max_tokens=8).rows.tolist() == list(range(7))
    for horizon in (0, 4):
        with pytest.raises(ForegateError, match="1 to 3 are possible"):
            SourceSamples(trace, 0, horizon)
    with pytest.raises(ForegateError, match="too short for gates"):
        SourceSamples(trace, 0, 1, max_tokens=3)


def test_hits_leave_out_what_is_no_expert() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    assert hits(logits, torch.tensor([[0, 2], [3, -1]]), 2) == (1, 2)
    assert hits(logits, torch.tensor([[0, 1], [1, 2]]), 2) == (4, 4)
