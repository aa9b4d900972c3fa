"""Judging gates: hand-made traces whose figures are known, tiny models, and the command line."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import foregate
from foregate.checkpoint.source import GATES_FILE
from foregate.cli.main import main
from foregate.config import AlignConfig
from foregate.errors import ForegateError
from foregate.lookahead import trace as trace_format
from foregate.lookahead.baselines import by_previous_token, fit_probe, frequencies
from foregate.lookahead.ceilings import InformedSamples, information_ceiling
from foregate.lookahead.evaluate import judge_gates
from foregate.lookahead.evaluation import GateEvaluation
from foregate.lookahead.gate import untrained_gate
from foregate.lookahead.gates import GatesHeader, LookaheadGates
from foregate.lookahead.samples import gate_layers, router_weights
from foregate.lookahead.trace import Sequence, Trace, TraceHeader, TraceLayer, TraceText

Folder = Callable[[str], Path]
HIDDEN, EXPERTS, LAYERS = 6, 4, 3
LENGTH, NUMBER = 10, 8  # of the sequences, which the two texts take turns with
TEXT = "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, " * 3


def write_trace(path: Path, seed: int = 0, last_chooses: int | None = None) -> Trace:
    """A trace of random inputs whose routers read them off: scores are the first values of the input.

    Layer 1 is given what layer 0 is given, layer 2 something of its own. last_chooses: what the last layer chooses,
    always, whatever its scores; an index outside the experts is no expert.
    """
    generator = torch.Generator().manual_seed(seed)
    layer = TraceLayer("", "", EXPERTS, 1, HIDDEN, HIDDEN, EXPERTS, True)
    layers = tuple(replace(layer, module=f"layers.{n}.experts", router=f"layers.{n}.gate") for n in range(LAYERS))
    texts = tuple(TraceText(name, name * 8, 100, LENGTH * NUMBER // 2) for name in ("a", "b"))
    sequences = tuple(Sequence(LENGTH * n, LENGTH, n % 2) for n in range(NUMBER))
    header = TraceHeader(
        "hand", "HandMade", 16, "none", 32, HIDDEN, 10_000, LENGTH, 0, layers=layers, texts=texts, sequences=sequences
    )
    path.mkdir()
    (path / trace_format.HEADER_FILE).write_text(header.to_json())
    inputs = torch.randn(LAYERS, header.num_tokens, HIDDEN, generator=generator).bfloat16()
    inputs[1] = inputs[0]
    columns = {trace_format.TOKENS_FILE: torch.zeros(header.num_tokens, dtype=torch.int32)}
    columns[trace_format.EMBEDDINGS_FILE] = torch.randn(header.num_tokens, HIDDEN, generator=generator).bfloat16()
    for n in range(LAYERS):
        chosen = inputs[n, :, :EXPERTS].argmax(1, keepdim=True)
        if n == LAYERS - 1 and last_chooses is not None:
            chosen = torch.full_like(chosen, last_chooses)
        for name, value in (("inputs", inputs[n]), ("scores", inputs[n, :, :EXPERTS]), ("chosen", chosen.short())):
            columns[trace_format.column_file(name, value.dtype, n)] = value
    for name, value in columns.items():
        (path / name).write_bytes(value.contiguous().view(torch.uint8).numpy().tobytes())
    weights = {trace_format.router_tensor("weight", n): torch.eye(EXPERTS, HIDDEN) for n in range(LAYERS)}
    gains = {trace_format.router_tensor("gain", n): torch.ones(HIDDEN) for n in range(LAYERS)}
    save_file(weights | gains, path / trace_format.ROUTERS_FILE)
    return Trace(path)


def untrained_gates(trace: Trace, horizon: int, width: int = 0) -> LookaheadGates:
    header = GatesHeader(gate_layers(trace), trace.header.embedding_size, horizon, width, {})
    routers = router_weights(trace)
    return LookaheadGates(
        header,
        [
            untrained_gate(header.layers, routers, source, horizon, width, header.input_size(source))
            for source in range(len(header.layers) + 1)
        ],
    )


def cell(result: GateEvaluation, source: str, horizon: int):
    (found,) = (c for c in result.cells if (c.source, c.horizon) == (source, horizon))
    return found


def test_known_figures(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t")
    result = judge_gates(trace, untrained_gates(trace, 2))
    assert [(c.source, c.horizon, c.layer, c.next_token) for c in result.cells] == [
        ("source-000", 1, 1, False),
        ("source-000", 2, 2, False),
        ("source-001", 1, 2, False),
        ("source-001", 2, 0, True),
        ("source-002", 1, 0, True),
        ("source-002", 2, 1, True),
        ("token", 1, 0, False),
        ("token", 2, 1, False),
    ]
    same = cell(result, "source-000", 1).scores  # layer 1 is given what layer 0 is given
    for method in ("next_router", "untrained_gate", "gate"):
        assert same[method].recall == (1, 1, 1)
        assert same[method].exact_sets == same[method].auc == 1
    for c in result.cells:
        assert c.scores["ceiling"].recall[0] == 1
        assert c.scores["gate"] == c.scores["untrained_gate"]
    assert cell(result, "source-000", 2).scores["gate"].recall[0] < 0.7  # nothing to know
    assert [(g.kind, g.horizon, g.targets) for g in result.groups] == [
        ("in token", 1, 2),
        ("in token", 2, 1),
        ("next token", 1, 1),
        ("next token", 2, 2),
        ("from token", 1, 1),
        ("from token", 2, 1),
    ]


def test_rows_that_are_judged(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t")
    result = judge_gates(trace, None, horizon=2)
    assert result.trace["tokens"] == NUMBER * LENGTH // 2  # the second half of each text's sequences
    assert cell(result, "source-000", 1).scores["frequency"].tokens == NUMBER * LENGTH // 2
    across = NUMBER // 2 * (LENGTH - 1)  # a sequence's last token has no next one
    assert cell(result, "source-001", 1).scores["frequency"].tokens == across  # all its targets are judged on one set
    assert "first half" in result.fitted_on and f"{NUMBER * LENGTH // 2} tokens" in result.fitted_on
    assert set(result.texts) == {"a", "b"}
    assert result.texts["a"]["ceiling"].tokens == result.texts["b"]["ceiling"].tokens
    whole = judge_gates(trace, None, horizon=2, fit=write_trace(tmp_path / "other", seed=1))
    assert whole.trace["tokens"] == trace.num_tokens
    assert "80 tokens" in whole.fitted_on
    assert judge_gates(trace, None, horizon=2, max_tokens=4 * LENGTH).trace["tokens"] == 2 * LENGTH


def test_every_group_sums_its_cells_and_every_cell_its_texts(tmp_path: Path) -> None:
    result = judge_gates(write_trace(tmp_path / "t"), None, horizon=2)
    found = sum(round(c.scores["frequency"].recall[0] * c.scores["frequency"].tokens) for c in result.cells)
    assert round(result.overall["frequency"].recall[0] * result.overall["frequency"].tokens) == found
    assert (
        sum(score.tokens for score in (t["ceiling"] for t in result.texts.values())) == result.overall["ceiling"].tokens
    )
    one = cell(result, "source-000", 1)  # both texts have the same number of tokens
    by_text = [one.recall_by_text[name]["previous_token"] for name in ("a", "b")]
    assert one.scores["previous_token"].recall[0] == pytest.approx(sum(by_text) / 2)


def test_texts_of_the_same_name_stay_apart(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t")
    trace.header = replace(trace.header, texts=tuple(replace(text, name="a") for text in trace.texts))
    result = judge_gates(trace, None, horizon=1)
    assert set(result.texts) == set(result.cells[0].recall_by_text) == {"a", "a (2)"}


def test_baselines_know_a_constant_choice_and_ignore_no_expert(tmp_path: Path) -> None:
    constant = judge_gates(write_trace(tmp_path / "constant", last_chooses=3), None, horizon=1)
    assert cell(constant, "source-001", 1).scores["frequency"].recall[0] == 1
    assert cell(constant, "source-001", 1).scores["ceiling"].recall[0] > 0.9
    trace = write_trace(tmp_path / "none", last_chooses=EXPERTS)
    nothing = judge_gates(trace, untrained_gates(trace, 1))
    assert cell(nothing, "source-001", 1).scores["gate"].recall == (None, None, None)
    assert json.loads(nothing.to_json())["cells"][1]["scores"]["gate"]["exact_sets"] is None


def test_frequencies_and_previous_token_by_hand(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t")
    rows = torch.tensor([0, 3, 7])
    counts = torch.bincount(trace.chosen(0)[rows, 0].long(), minlength=EXPERTS)
    assert torch.equal(frequencies(trace, rows)[0], counts / 3)
    logits = by_previous_token(torch.tensor([[2], [-1]]), torch.tensor([0.1, 1.0, 0.0, 0.2]))
    assert logits.argsort(descending=True).tolist() == [[2, 1, 3, 0], [1, 3, 0, 2]]


def test_a_probe_finds_the_router(tmp_path: Path) -> None:
    probe = fit_probe(write_trace(tmp_path / "t"), 2, torch.arange(80))
    torch.testing.assert_close(probe.weight, torch.eye(EXPERTS, HIDDEN), atol=1e-2, rtol=0)


def test_methods_that_a_router_rules_out_are_left_out(tmp_path: Path) -> None:
    write_trace(tmp_path / "t")
    save_file({}, tmp_path / "t" / trace_format.ROUTERS_FILE)  # no router is linear
    result = judge_gates(Trace(tmp_path / "t"), None, horizon=1)
    assert list(result.overall) == ["frequency", "previous_token", "ceiling"]


def test_large_gates_show_what_inputs_say(tmp_path: Path) -> None:
    training, judged = write_trace(tmp_path / "t"), write_trace(tmp_path / "v", seed=1)
    samples = InformedSamples(training, 0, 2)
    given = samples.source(torch.tensor([10, 11]))
    assert given.shape == (2, samples.input_size) == (2, 3 * HIDDEN)
    assert not given[0, HIDDEN:].any()  # a sequence begins at row 10
    assert torch.equal(given[1, HIDDEN : 2 * HIDDEN], training.inputs(1)[10].float())
    assert torch.equal(given[1, 2 * HIDDEN :], training.inputs(2)[10].float())
    ceiling = information_ceiling(training, judged, 0, 2, width=16, settings=AlignConfig(epochs=2))
    assert ceiling.recall[0] > 0.9 > ceiling.recall[1]


def test_too_short_a_trace_and_gates_of_other_sizes(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t")
    with pytest.raises(ForegateError, match="too short to judge gates by"):
        judge_gates(trace, None, max_tokens=2 * LENGTH)  # one sequence of each text
    header = untrained_gates(trace, 1).header
    header = replace(header, embedding_size=HIDDEN + 2)
    with pytest.raises(ForegateError, match="another hidden size"):
        judge_gates(trace, LookaheadGates(header, [header.new_gate(source) for source in range(LAYERS + 1)]))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "t.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def aligned(store: Folder, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 16-bit store with gates, trained for a moment."""
    path = Path(shutil.copytree(store("mixtral"), tmp_path_factory.mktemp("aligned") / "m.store"))
    foregate.align(path, texts=[text], horizon=2, width=8, window=32, threads=1)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["foregate", "evaluate-gates", *map(str, args)])
    with pytest.raises(SystemExit) as exit_info:
        main()
    return int(exit_info.value.code or 0)


def test_gates_of_one_store_serve_another_quantization(
    aligned: Path, checkpoint: Folder, text: Path, tmp_path: Path
) -> None:
    four_bits = foregate.convert(checkpoint("mixtral"), tmp_path / "four.store", bits=4)
    named = foregate.evaluate_gates(four_bits, texts=[text], gates=aligned / GATES_FILE, window=32, threads=1)
    shutil.copy(aligned / GATES_FILE, four_bits / GATES_FILE)
    beside = foregate.evaluate_gates(four_bits, texts=[text], window=32, threads=1)
    assert named == beside
    assert (named.trace["bits"], named.horizon) == (4, 2)
    assert named.overall["gate"].recall[0] > named.overall["frequency"].recall[0]
    assert named.overall["gate"] != named.overall["untrained_gate"]
    assert named.seen_in_training == ("t.txt",)


def test_the_command(
    aligned: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "r.json", tmp_path / "r.png"
    arguments = ("--text", text, "--window", 32, "--report", out, "--plot", plot, "--layers", "--threads", 1)
    assert run(monkeypatch, aligned, *arguments) == 0
    printed = capsys.readouterr().out
    for line in ("MixtralForCausalLM, 3 MoE layers of 8 experts, 2 a token", "recording 288 tokens first", "recall@2"):
        assert line in printed
    assert "t.txt: the gates were trained on this text" in printed
    assert "source-002 +2" in printed
    data = json.loads(out.read_text())
    assert data["version"] == 1
    assert len(data["cells"]) == 8
    assert set(data["cells"][0]["scores"]) == set(data["overall"])
    assert len(data["overall"]["gate"]["calibration"]) > 1
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in aligned.parent.iterdir()] == ["m.store"]  # the temporary trace is gone


def test_a_store_without_gates(
    store: Folder, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    plot = tmp_path / "r.svg"
    arguments = [store("qwen3_moe"), "--text", text, "--window", 32, "--max-tokens", 128, "--scratch", tmp_path]
    if pytest.importorskip("matplotlib"):
        arguments += ["--plot", plot]
    assert run(monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out
    assert "has no lookahead gates: baselines and untrained gates only" in printed
    assert "untrained, further" in printed
    assert "64 tokens judged" in printed
    assert b"<svg" in plot.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "{text}", "--gates", "nowhere"], "no such gates: nowhere"),
        ([], "name either --text or --trace"),
        (["--text", "{text}", "--trace", "x"], "name either --text or --trace"),
        (["--trace", "nowhere"], "no such trace: nowhere"),
        (["--text", "{text}", "--max-tokens", "-1"], "--max-tokens -1"),
        (["--text", "{text}", "--plot", "a.jpg"], "must end with .png"),
        (["--text", "{text}", "--plot", "nowhere/a.png"], "there is no folder"),
        (["--text", "{text}", "--report", "nowhere/a.json"], "no such folder for the report"),
        (["--text", "{text}", "--scratch", "nowhere"], "nowhere"),
        (["--text", "{text}", "--fit", "nowhere"], "no such trace: nowhere"),
        (["--text", "{text}", "--gates", "{text}"], "is damaged"),
    ],
)
def test_one_line_says_what_is_wrong(
    arguments: list[str],
    message: str,
    store: Folder,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    assert run(monkeypatch, store("mixtral"), *(a.format(text=text) for a in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_gates_and_traces_of_another_model(
    aligned: Path,
    store: Folder,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    assert run(monkeypatch, store("qwen3_moe"), "--text", text, "--gates", aligned / GATES_FILE) == 2
    assert "holds the lookahead gates of another model" in capsys.readouterr().err
    write_trace(tmp_path / "t")
    assert run(monkeypatch, aligned, "--trace", tmp_path / "t") == 2
    assert "is the trace of another model" in capsys.readouterr().err


def test_a_plot_needs_matplotlib(
    store: Folder, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(monkeypatch, store("mixtral"), "--text", text, "--plot", tmp_path / "a.png") == 2
    assert capsys.readouterr().err == 'foregate: --plot needs matplotlib: pip install "foregate[plot]"\n'
