"""Tokens become text as they come: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a part of a character decodes to


class TextStream:
    """The text of one reply. What `push` and `finish` return, joined, is the decoded reply up to the first stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._tokens: list[int] = []
        self._start = self._read = 0  # tokens from _start on give context, those from _read on are not yet text
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that is certain now. After a stop string `stopped` is true and nothing more comes."""
        self._tokens.append(token)
        before = self._decode(self._start, self._read)
        after = self._decode(self._start, len(self._tokens))
        if len(after) <= len(before) or after.endswith(UNFINISHED):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return self._until_stop(after[len(before) :])

    def finish(self) -> str:
        """What was held back, now that no token follows."""
        if self.stopped:
            return ""
        before = self._decode(self._start, self._read)
        rest = self._until_stop(self._decode(self._start, len(self._tokens))[len(before) :])
        held, self._held = self._held, ""
        return rest + held

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True)

    def _until_stop(self, new: str) -> str:
        text = self._held + new
        found = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
