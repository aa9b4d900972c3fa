"""Text that comes token by token, against decoding everything at the end."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from foregate.serve.text import TextStream

DEMO = Path(__file__).parents[2] / "demo/mixtral-tiny"
TEXTS = st.text(alphabet="ab\n €𝄞é 字", max_size=30)


@pytest.fixture(scope="module")
def tokenizers(checkpoint: Callable[[str], Path]) -> list[PreTrainedTokenizerBase]:
    """One with a token a byte, one with words."""
    return [AutoTokenizer.from_pretrained(path) for path in (checkpoint("mixtral"), DEMO)]


def streamed(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream, parts = TextStream(tokenizer, stops), []
    for token in ids:
        parts.append(stream.push(token))
        if stream.stopped:
            break
    return [*parts, stream.finish()], stream.stopped


@given(text=TEXTS, cut=st.integers(0, 40))
@settings(deadline=None)
def test_pieces_join_to_the_decoded_text(tokenizers: list, text: str, cut: int) -> None:
    for tokenizer in tokenizers:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:cut]  # may end within a character
        parts, _ = streamed(tokenizer, ids)
        assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=True)
        assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts[:-1])


@given(text=TEXTS, stops=st.lists(st.text(alphabet="ab\n €", min_size=1, max_size=4), min_size=1, max_size=3))
@settings(deadline=None)
def test_stop_strings_against_cutting_the_whole_text(tokenizers: list, text: str, stops: list[str]) -> None:
    ids = tokenizers[0](text, add_special_tokens=False)["input_ids"]
    parts, stopped = streamed(tokenizers[0], ids, tuple(stops))
    ends = [len(text[: text.index(stop) + len(stop)].encode()) for stop in stops if stop in text]
    assert stopped == bool(ends)
    if not ends:
        assert "".join(parts) == text
        return
    first = text.encode()[: min(ends)].decode()  # a token is a byte here: what has come when the first stop is complete
    assert "".join(parts) == first[: min(first.index(stop) for stop in stops if stop in first)]


def test_special_tokens_are_no_text(tokenizers: list) -> None:
    tokenizer = tokenizers[1]
    ids = tokenizer("hello <|user|> there")["input_ids"]
    assert "".join(streamed(tokenizer, ids)[0]) == tokenizer.decode(ids, skip_special_tokens=True) == "hello  there"
