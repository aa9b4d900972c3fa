"""Alignment on tiny random models: gates learn, the same bytes every time, and nothing is lost or mixed up."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import foregate
from foregate.checkpoint import workspace
from foregate.checkpoint.store import Store
from foregate.cli.main import main
from foregate.config import AlignConfig
from foregate.errors import ForegateError
from foregate.lookahead.align import AlignedSource, default_width
from foregate.lookahead.fit import recall
from foregate.lookahead.gate import GateLayer
from foregate.lookahead.gates import GatesHeader, LookaheadGates
from foregate.lookahead.record import plan_trace, read_texts, record_trace
from foregate.lookahead.samples import SourceSamples
from foregate.lookahead.trace import Trace
from foregate.model.generate import generate, load_tokenizer

Folder = Callable[[str], Path]
TEXT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. " * 4
)
SMALL = {"horizon": 2, "width": 8, "threads": 1}
SLOW = pytest.mark.slow  # kept out of the quick suite for their number only
FAMILIES = (
    "mixtral",
    "qwen2_moe",  # shared expert
    "deepseek_v3",  # sigmoid, correction bias, groups, shared expert, dense first layer
    pytest.param("glm4_moe", marks=SLOW),
    "gpt_oss",  # bias
    pytest.param("granitemoe", marks=SLOW),
    pytest.param("phimoe", marks=SLOW),  # no RMS norm
    pytest.param("lfm2_moe", marks=SLOW),
    "gemma4_text",  # a router that is not linear
    pytest.param("deepseek_v4", marks=SLOW),  # one layer's experts are looked up by token
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "t.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def trace(store: Folder, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = foregate.load(store("mixtral"), memory="100%", threads=1)
    plan = plan_trace(model, read_texts(load_tokenizer(str(store("mixtral"))), [text]), window=32)
    path = record_trace(plan, tmp_path_factory.mktemp("traces") / "trace")
    model.foregate.close()
    return path


@pytest.fixture
def copy(store: Folder, tmp_path: Path) -> Path:
    """A store that a test may change."""
    return Path(shutil.copytree(store("mixtral"), tmp_path / "copy"))


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_learn_the_texts_of_any_family(store: Folder, family: str, text: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(store(family), tmp_path / "store")
    sources: list[AlignedSource] = []
    path = foregate.align(
        copied,
        texts=[text],
        window=32,
        **{**SMALL, "horizon": 1},
        report=lambda source, done, total: sources.append(source),
    )
    assert path == copied / "lookahead.safetensors"
    gates = LookaheadGates.load(path, Store(copied).layers)
    assert len(gates.gates) == len(sources) == len(Store(copied).layers) + 1
    before = [value for source in sources for value in source.untrained_recall]
    after = [value for source in sources for value in source.recall]
    assert sum(after) > sum(before) + 0.05 * len(after)
    assert not list(tmp_path.glob("*trace*"))  # the temporary trace is gone
    assert not (copied / "lookahead.partial").exists()


def test_recall_on_the_texts_learned_from(copy: Path, trace: Path) -> None:
    reports: list[AlignedSource] = []
    gates = LookaheadGates.load(
        foregate.align(copy, trace=trace, **SMALL, report=lambda source, done, total: reports.append(source)),
        Store(copy).layers,
    )
    opened, cpu = Trace(trace), torch.device("cpu")
    for source, gate in enumerate(gates.gates):
        samples = SourceSamples(opened, source, 2)
        assert sum(recall(samples, gate, samples.training, cpu)) > sum(reports[source].untrained_recall)
        assert recall(samples, gate, samples.validation, cpu) == reports[source].recall
    trained = gates.header.trained
    assert trained["trace"]["texts"] == [{"name": t.name, "sha256": t.sha256} for t in opened.texts]
    assert (trained["trace"]["bits"], trained["trace"]["quantizer"], trained["loss"]) == (16, "none", "log near")
    assert [source["name"] for source in trained["sources"]] == ["source-000", "source-001", "source-002", "token"]
    assert trained["tokens"]["training"] + trained["tokens"]["validation"] == len(SourceSamples(opened, 0, 2).rows)


def test_killed_and_resumed_it_is_the_same_and_done_once(copy: Path, trace: Path) -> None:
    whole = foregate.align(copy, trace=trace, **SMALL).read_bytes()
    assert foregate.align(copy, trace=trace, **SMALL).read_bytes() == whole
    (copy / "lookahead.safetensors").write_bytes(b"older gates")
    with pytest.raises(KeyboardInterrupt):
        foregate.align(copy, trace=trace, **SMALL, report=interrupt_at(2))
    assert (copy / "lookahead.safetensors").read_bytes() == b"older gates"
    kept = (copy / "lookahead.partial" / "source-001.safetensors").stat().st_mtime_ns
    with pytest.raises(ForegateError, match="holds an unfinished alignment with another source or other settings"):
        foregate.align(copy, trace=trace, **{**SMALL, "width": 16})
    with pytest.raises(KeyboardInterrupt):
        foregate.align(copy, trace=trace, **SMALL, report=interrupt_at(3))
    assert (copy / "lookahead.partial" / "source-001.safetensors").stat().st_mtime_ns == kept
    assert foregate.align(copy, trace=trace, **SMALL).read_bytes() == whole
    assert not (copy / "lookahead.partial").exists()


def test_one_alignment_at_a_time(copy: Path, trace: Path) -> None:
    with pytest.raises(ForegateError, match="another alignment to .* is running"):
        foregate.align(
            copy, trace=trace, **SMALL, report=lambda *done: foregate.align(copy, trace=trace, **SMALL) and None
        )


def test_interrupted_before_the_first_gate_nothing_is_left(
    copy: Path, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(copy.iterdir())
    monkeypatch.setattr("foregate.lookahead.align.fit_gate", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        foregate.align(copy, trace=trace, **SMALL)
    assert sorted(copy.iterdir()) == before


def test_a_temporary_trace_outlives_an_interruption(copy: Path, text: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "texts": [text], "window": 32, "scratch": tmp_path / "scratch"}
    (tmp_path / "scratch").mkdir()
    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        foregate.align(copy, **settings, report=interrupt_at(1), announce=lines.append)
    assert "recording 416 tokens first: 0.2 MiB in" in lines[0]
    assert Trace(tmp_path / "scratch" / "copy.align-trace").num_tokens == 416
    with pytest.raises(ForegateError, match="holds the trace of other texts or settings: remove it"):
        foregate.align(copy, **{**settings, "window": 16})
    lines.clear()
    foregate.align(copy, **settings, announce=lines.append)
    assert not any("recording" in line for line in lines)
    assert not list((tmp_path / "scratch").iterdir())


def test_a_store_with_gates_is_still_a_store(copy: Path, store: Folder, trace: Path) -> None:
    foregate.align(copy, trace=trace, **SMALL)
    assert foregate.verify(copy) == 24
    texts = []
    for path in (copy, store("mixtral")):
        model = foregate.load(path, memory="50%", threads=1)
        texts.append(generate(model, load_tokenizer(str(path)), "It was", max_new_tokens=8).text)
        model.foregate.close()
    assert texts[0] == texts[1]


def test_no_room_for_the_gates(store: Folder, trace: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linked = small_disk / "store"
    linked.mkdir()
    for file in store("mixtral").iterdir():
        (linked / file.name).symlink_to(file)
    before = sorted(linked.iterdir())
    with pytest.raises(ForegateError, match="MiB free and the alignment needs"):
        foregate.align(linked, trace=trace, **SMALL)
    assert sorted(linked.iterdir()) == before
    monkeypatch.setattr(workspace, "SLACK_BYTES", -(1 << 30))  # what was free is taken by others meanwhile
    (small_disk / "others").write_bytes(bytes(1000 << 10))
    with pytest.raises(ForegateError, match="the disk of .* is full; finished work is kept in .*lookahead.partial"):
        foregate.align(linked, trace=trace, **SMALL)
    (small_disk / "others").unlink()
    assert foregate.align(linked, trace=trace, **SMALL).is_file()


def test_what_cannot_be_learned_from(copy: Path, store: Folder, trace: Path, text: Path, tmp_path: Path) -> None:
    def refused(match: str, **settings: object) -> None:
        with pytest.raises(ForegateError, match=match) as caught:
            foregate.align(copy, **{**SMALL, **settings})
        assert "\n" not in str(caught.value)
        assert not (copy / "lookahead.partial").exists()
        assert not list(tmp_path.glob("*align-trace*"))

    short, empty, binary = tmp_path / "short.txt", tmp_path / "empty.txt", tmp_path / "binary.txt"
    short.write_text(TEXT[:40])
    empty.write_text("")
    binary.write_bytes(b"\xff\xfe\x00")
    refused("name either --text or --trace")
    refused("name either --text or --trace", trace=trace, texts=[text])
    refused("no such trace", trace=tmp_path / "nowhere")
    refused("is empty", texts=[empty], window=32)
    refused("not UTF-8", texts=[binary], window=32)
    refused("cannot be read", texts=[tmp_path / "nowhere.txt"], window=32)
    refused("short.txt is too short", texts=[short], window=64)
    refused("no text gives two sequences", texts=[short], window=32)
    refused("too short for gates", trace=trace, max_tokens=8)
    refused("no text gives two sequences", trace=trace, max_tokens=32)
    refused("--horizon 4: 1 to 3", trace=trace, horizon=4)
    refused("--horizon 0: 1 to 3", trace=trace, horizon=0)
    refused("--width -1", trace=trace, width=-1)
    refused("--max-tokens -1", trace=trace, max_tokens=-1)
    refused("--device tpu: choose", trace=trace, device="tpu")
    refused("threads=-1", trace=trace, threads=-1)
    with pytest.raises(ForegateError, match="is the trace of another model"):
        foregate.align(store("qwen3_moe"), trace=trace, **SMALL)
    if not torch.cuda.is_available():
        refused("finds no CUDA device", trace=trace, device="cuda")


def test_the_default_width_keeps_to_its_share() -> None:
    layers = tuple(GateLayer(f"layers.{n}", 8, 2, 256) for n in range(12))
    header = GatesHeader(layers, 256, 3, 0, {})
    for parameters in (2_783_488, 6_000_000, 8_300_000):
        width = default_width(header, parameters)
        assert width % 4 == 0
        for sign, size in ((-1, width), (1, width + 4)):
            gates = [replace(header, width=size).new_gate(source) for source in range(13)]
            learned = sum(gate.learned_parameters + 3 * 256 for gate in gates)
            assert sign * learned > sign * 0.05 * parameters
    assert default_width(header, 1000) == 4
    assert default_width(header, 10**12) == AlignConfig.max_width


def test_the_command_says_how_it_went(
    copy: Path, trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["align", copy, "--trace", trace, "--horizon", "2", "--width", "8", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["foregate", *map(str, arguments)])
    monkeypatch.setattr("foregate.lookahead.align._Job._fit", interrupting_fit(2))
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 130
    assert "interrupted: what is finished is kept, run the same command again" in capsys.readouterr().err
    assert len(json.loads((copy / "lookahead.partial" / "journal.json").read_text())["sources"]) == 2
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["foregate", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("4 gates of width 8, horizon 2: ")
    assert [line.split(":")[0] for line in lines[1:5]] == ["source-000", "source-001", "source-002", "token"]
    assert all(line.count("recall@2") == 2 for line in lines[1:5])
    assert "lookahead.safetensors" in lines[5]


def interrupt_at(number: int) -> Callable[[AlignedSource, int, int], None]:
    """A report that presses Ctrl-C when so many sources are done."""

    def report(source: AlignedSource, done: int, total: int) -> None:
        if done == number:
            raise KeyboardInterrupt

    return report


def interrupting_fit(number: int) -> Callable:
    """`_Job._fit` that presses Ctrl-C at source `number`."""
    from foregate.lookahead.align import _Job

    original = _Job._fit

    def fit(self: object, source: int) -> object:
        if source == number:
            raise KeyboardInterrupt
        return original(self, source)

    return fit
