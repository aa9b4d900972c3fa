"""Recorded traces against transformers' own run of the checkpoint; resuming, sizes, errors."""

import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from families import tiny_config
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import foregate
from foregate.checkpoint.architecture import auto_class
from foregate.cli.main import main
from foregate.config import TraceConfig
from foregate.errors import ForegateError
from foregate.lookahead.record import TracePlan, plan_trace, read_texts, record_trace
from foregate.lookahead.trace import Trace
from foregate.model.generate import load_tokenizer

Folder = Callable[[str], Path]
LONG = "It was a bright cold day in April, and the clocks were striking thirteen. " * 2  # 148 tokens, one a byte
SHORT = "Ein Gespenst geht um in Europa."  # 31


@pytest.fixture(scope="module")
def model(store: Folder) -> Iterator[PreTrainedModel]:
    model = foregate.load(store("mixtral"), memory="50%")
    yield model
    model.foregate.close()


@pytest.fixture(scope="module")
def tokenizer(store: Folder) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(store("mixtral")))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    (tmp_path / "long.txt").write_text(LONG)
    (tmp_path / "short.txt").write_text(SHORT)
    return [tmp_path / "long.txt", tmp_path / "short.txt"]


@pytest.fixture
def plan(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, files: list[Path]) -> TracePlan:
    return plan_trace(model, read_texts(tokenizer, files), window=16)


def test_rows_are_what_transformers_computes(plan: TracePlan, checkpoint: Folder, tmp_path: Path) -> None:
    trace = Trace(record_trace(plan, tmp_path / "trace"))
    reference = auto_class(tiny_config("mixtral")).from_pretrained(checkpoint("mixtral"), dtype=torch.float32).eval()
    assert [layer.module for layer in trace.layers] == [f"model.layers.{n}.mlp.experts" for n in range(3)]
    for sequence in trace.sequences:
        rows = slice(sequence.start, sequence.start + sequence.length)
        with torch.inference_mode():
            scores = reference(trace.tokens[rows].long()[None], output_router_logits=True).router_logits
        for index in range(3):
            gate = reference.model.layers[index].mlp.gate.weight
            near = {"rtol": 1e-2, "atol": 1e-3}  # bfloat16
            torch.testing.assert_close(trace.scores(index)[rows].float(), scores[index], **near)
            made = trace.inputs(index)[rows].float() @ gate.detach().T
            torch.testing.assert_close(made, scores[index], rtol=2e-2, atol=1e-2)
            best = scores[index].topk(2).indices
            assert torch.equal(trace.chosen(index)[rows].long().sort().values, best.sort().values)
            assert torch.equal(trace.expert_inputs(index)[rows], trace.inputs(index)[rows])


def test_embeddings_and_routers_are_the_models(plan: TracePlan, checkpoint: Folder, tmp_path: Path) -> None:
    trace = Trace(record_trace(plan, tmp_path / "trace"))
    reference = auto_class(tiny_config("mixtral")).from_pretrained(checkpoint("mixtral"), dtype=torch.float32)
    table = reference.model.embed_tokens.weight.detach()
    assert torch.equal(trace.embeddings, table[trace.tokens.long()].to(torch.bfloat16))
    for index, layer in enumerate(reference.model.layers):
        router = trace.router(index)
        assert torch.equal(router.weight, layer.mlp.gate.weight.detach())
        assert torch.allclose(router.gain, layer.post_attention_layernorm.weight.detach(), rtol=1e-4)
        assert router.bias is None
    experts = sum(p.numel() for name, p in reference.named_parameters() if ".experts." in name)
    assert trace.header.backbone_parameters == sum(p.numel() for p in reference.parameters()) - experts


def test_texts_take_turns_in_windows_without_overlap(
    plan: TracePlan, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    trace = Trace(record_trace(plan, tmp_path / "trace"))
    assert [sequence.text for sequence in trace.sequences] == [0, 1, *[0] * 8]
    assert [sequence.start for sequence in trace.sequences] == list(range(0, 160, 16))
    assert [(text.name, text.bytes, text.tokens) for text in trace.texts] == [
        ("long.txt", 148, 148),
        ("short.txt", 31, 31),
    ]
    assert trace.texts[1].sha256 == hashlib.sha256(SHORT.encode()).hexdigest()
    ids = {n: torch.cat([trace.tokens[s.start : s.start + 16] for s in trace.sequences if s.text == n]) for n in (0, 1)}
    assert ids[0].tolist() == tokenizer(LONG)["input_ids"][:144]
    assert ids[1].tolist() == tokenizer(SHORT)["input_ids"][:16]


def test_special_tokens_begin_every_sequence(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, files: list[Path], tmp_path: Path
) -> None:
    def prefixing(text: str, add_special_tokens: bool = True, **options: object) -> dict:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}

    trace = Trace(record_trace(plan_trace(model, read_texts(prefixing, files[:1]), window=20), tmp_path / "trace"))
    rows = trace.tokens.view(-1, 20)
    assert (rows[:, 0] == 1).all()
    assert rows[:, 1:].flatten().tolist() == tokenizer(LONG)["input_ids"][: 19 * len(rows)]


def test_the_token_budget_is_shared(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, files: list[Path]
) -> None:
    plan = plan_trace(model, read_texts(tokenizer, files), window=10, max_tokens=59)
    assert [sequence.text for sequence in plan.header.sequences] == [0, 1, 0, 1, 0]


def test_the_model_continues_the_first_halves(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, files: list[Path], tmp_path: Path
) -> None:
    texts = read_texts(tokenizer, files[:1])
    plans = [plan_trace(model, texts, window=16, generate=6, max_tokens=56, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (Trace(record_trace(plan, tmp_path / str(n))) for n, plan in enumerate(plans))
    assert first.tokens.tolist() == again.tokens.tolist() != other.tokens.tolist()
    rows = first.tokens.view(4, 14)
    assert rows[:, :8].tolist() == texts.tokens[0][:64].view(4, 16)[:, :8].tolist()
    assert rows[:, 8:].tolist() != texts.tokens[0][:64].view(4, 16)[:, 8:14].tolist()
    assert first.header.generated == 6
    assert digest(tmp_path / "0") == digest(tmp_path / "1")


def test_resumed_after_an_interruption_it_is_the_same_and_done_once(
    plan: TracePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = digest(record_trace(plan, tmp_path / "whole"))
    monkeypatch.setattr(TraceConfig, "journal_seconds", -1.0)  # note every sequence
    with pytest.raises(KeyboardInterrupt):
        record_trace(plan, tmp_path / "trace", interrupt_at(64))
    assert not (tmp_path / "trace").exists()
    done: list[int] = []
    record_trace(plan, tmp_path / "trace", lambda tokens, total: done.append(tokens))
    assert done == [*range(64, 160, 16), 160]
    assert digest(tmp_path / "trace") == whole


def test_unfinished_work_is_neither_mixed_nor_lost(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: TracePlan,
    files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = plan_trace(model, read_texts(tokenizer, files), window=20)
    with pytest.raises(KeyboardInterrupt):  # before anything is noted: nothing is left
        record_trace(plan, tmp_path / "trace", interrupt_at(64))
    assert not (tmp_path / "trace.partial").exists()
    monkeypatch.setattr(TraceConfig, "journal_seconds", -1.0)
    with pytest.raises(KeyboardInterrupt):
        record_trace(plan, tmp_path / "trace", interrupt_at(64))
    with pytest.raises(ForegateError, match="holds an unfinished trace with another source or other settings"):
        record_trace(other, tmp_path / "trace")
    with pytest.raises(ForegateError, match="another trace to .* is running"):
        record_trace(plan, tmp_path / "trace", lambda done, total: record_trace(plan, tmp_path / "trace"))
    record_trace(plan, tmp_path / "trace")
    with pytest.raises(ForegateError, match="exists already"):
        record_trace(plan, tmp_path / "trace")


def test_the_announced_size_is_the_size_on_disk(plan: TracePlan, tmp_path: Path) -> None:
    path = record_trace(plan, tmp_path / "trace")
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    routers, header = sizes.pop("routers.safetensors"), sizes.pop("trace.json")
    assert header
    assert sum(sizes.values()) == 160 * (4 + 2 * 64 + 3 * (2 * 64 + 2 * 8 + 2 * 2))
    known = 3 * 4 * (8 * 64 + 64)  # weight and gain
    assert plan.nbytes == sum(sizes.values()) + known
    assert known < routers < known + 1024


def test_lack_of_space_is_said_before_anything_is_written(plan: TracePlan, small_disk: Path) -> None:
    with pytest.raises(ForegateError, match="MiB free and the trace needs"):
        record_trace(plan, small_disk / "trace")
    assert not list(small_disk.iterdir())


def test_experts_with_an_input_of_their_own(store: Folder, files: list[Path], tmp_path: Path) -> None:
    model = foregate.load(store("gemma4"), memory="50%")
    calls: list[torch.Tensor] = []
    run_layer = model.foregate.run_layer
    model.foregate.run_layer = lambda *args: (calls.append(args[1].clone()), run_layer(*args))[1]
    texts = read_texts(load_tokenizer(str(store("gemma4"))), files[:1])
    trace = Trace(record_trace(plan_trace(model, texts, window=64, max_tokens=64), tmp_path / "trace"))
    model.foregate.close()
    for index, hidden in enumerate(calls):
        assert trace.expert_inputs(index).shape == (64, 64)
        assert torch.equal(trace.expert_inputs(index), hidden.to(torch.bfloat16))
        assert not torch.equal(trace.expert_inputs(index), trace.inputs(index))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "--window 0: more than 1 tokens"),
        ({"window": 2, "generate": 4}, "--window 2: more than 2 tokens"),
        ({"window": 500}, "--window 500 is longer than the model's context of 256"),
        ({"window": 200, "generate": 200}, "--window 300 is longer than the model's context"),
        ({"window": 16, "max_tokens": 15}, "--max-tokens 15 does not hold one sequence of 16"),
        ({"window": 32}, "short.txt is too short: it has 31 tokens, a window of text 32"),
        ({"window": 16, "generate": -1}, "0 or above is needed"),
    ],
)
def test_settings_that_do_not_fit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, files: list[Path], settings: dict, message: str
) -> None:
    with pytest.raises(ForegateError, match=message) as caught:
        plan_trace(model, read_texts(tokenizer, files), **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "match"), [(b"", "is empty"), (b"\xff\xfe", "not UTF-8"), (None, "cannot be read")]
)
def test_texts_that_cannot_be_used(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, content: bytes | None, match: str
) -> None:
    if content is not None:
        (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(ForegateError, match=match):
        read_texts(tokenizer, [tmp_path / "t.txt"])
    with pytest.raises(ForegateError, match="no text to trace"):
        read_texts(tokenizer, [])


def test_the_command_announces_the_size_and_records(
    store: Folder, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["trace", store("mixtral"), "--text", files[0], "--text", files[1], "--out", tmp_path / "trace"]
    monkeypatch.setattr(sys, "argv", ["foregate", *map(str, arguments), "--window", "16", "--max-tokens", "64"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    out = capsys.readouterr().out
    assert "64 tokens in 4 sequences, 3 MoE layers: the trace will take 0.0 MiB (576 bytes a token)" in out
    assert Trace(tmp_path / "trace").num_tokens == 64
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert (
        capsys.readouterr().err
        == f"foregate: {tmp_path / 'trace'} exists already: remove it or name another destination\n"
    )


def interrupt_at(tokens: int) -> Callable[[int, int], None]:
    """A progress callback that presses Ctrl-C when so many tokens are done."""

    def progress(done: int, total: int) -> None:
        if done == tokens:
            raise KeyboardInterrupt

    return progress


def digest(path: Path) -> dict[str, str]:
    """SHA-256 of every file of a trace."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}
