"""Evaluation against a loop that predicts one token at a time, and its errors."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import foregate
from foregate.cli.main import main
from foregate.errors import ForegateError
from foregate.model.evaluate import _windows, evaluate
from foregate.model.generate import load_tokenizer

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen."


@pytest.fixture(scope="module")
def model(store: Callable[[str], Path]) -> Iterator[PreTrainedModel]:
    model = foregate.load(store("mixtral"), memory="100%")
    yield model
    model.foregate.close()


@pytest.fixture(scope="module")
def tokenizer(store: Callable[[str], Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(store("mixtral")))


@pytest.mark.parametrize("with_prefix", [False, True])
def test_against_one_token_at_a_time(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, with_prefix: bool
) -> None:
    """Every token predicted once, from exactly the context that its window gives."""
    (tmp_path / "t.txt").write_text(TEXT)
    prefix = [5] if with_prefix else []

    def prefixing(text: str, add_special_tokens: bool = True, **options: object) -> dict:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return {"input_ids": prefix + ids if add_special_tokens else ids}

    result = evaluate(model, prefixing, tmp_path / "t.txt", window=24, stride=8)
    ids, nats = tokenizer(TEXT)["input_ids"], 0.0
    starts = [position for position in range(len(ids)) if position or prefix]
    length = 24 - len(prefix)
    for position in starts:
        end = length
        while end <= position:
            end += 8
        start = max(0, min(end, len(ids)) - length)
        with torch.inference_mode():
            logits = model(torch.tensor([prefix + ids[start:position]])).logits[0, -1]
        nats -= logits.log_softmax(-1)[ids[position]].item()
    assert result.tokens == len(starts)
    assert result.nats == pytest.approx(nats, rel=1e-4)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / len(TEXT), rel=1e-4)
    assert result.perplexity == pytest.approx(math.exp(nats / len(starts)), rel=1e-4)


@pytest.mark.parametrize(("tokens", "length", "stride"), [(1, 4, 2), (4, 4, 2), (5, 4, 2), (17, 8, 3), (100, 7, 6)])
def test_windows_cover_every_token_once(tokens: int, length: int, stride: int) -> None:
    windows = list(_windows(tokens, length, stride))
    assert [n for _, end, first in windows for n in range(first, end)] == list(range(tokens))
    assert all(0 <= start <= first and end - start <= length for start, end, first in windows)
    assert all(first - start >= length - stride for start, _, first in windows[1:])


def test_the_command_prints_json(
    store: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "t.txt").write_text(TEXT)
    arguments = [
        "evaluate",
        str(store("mixtral")),
        "--text",
        str(tmp_path / "t.txt"),
        "--json",
        "--window",
        "64",
        "--stride",
        "32",
    ]
    monkeypatch.setattr(sys, "argv", ["foregate", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    (row,) = json.loads(capsys.readouterr().out)
    assert row["bytes"] == len(TEXT)
    assert row["bits_per_byte"] > 1


@pytest.mark.parametrize(
    ("content", "match"), [(b"", "is empty"), (b"\xff\xfe", "not UTF-8"), (None, "cannot be read"), (b"a", "too short")]
)
def test_texts_that_cannot_be_used(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, content: bytes | None, match: str
) -> None:
    if content is not None:
        (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(ForegateError, match=match):
        evaluate(model, tokenizer, tmp_path / "t.txt", window=64, stride=32)


@pytest.mark.parametrize(("window", "stride"), [(100_000, 8), (64, 0), (64, 64)])
def test_windows_that_do_not_fit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, window: int, stride: int
) -> None:
    (tmp_path / "t.txt").write_text(TEXT)
    with pytest.raises(ForegateError, match="--window|--stride"):
        evaluate(model, tokenizer, tmp_path / "t.txt", window=window, stride=stride)
