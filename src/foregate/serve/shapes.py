"""Answers in OpenAI's shapes: whole objects and the chunks of streams, for chat and for completions."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from foregate.serve.errors import ApiError
from foregate.serve.sampling import TokenLogprob
from foregate.serve.sequence import Piece
from foregate.serve.streaming import Replies


@dataclass
class Collected:
    """A reply so far."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    generated: int = 0
    finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        """Append a piece. Raises ApiError for one that says the reply failed."""
        if piece.error is not None:
            raise ApiError(500, piece.error)
        self.text += piece.text
        self.logprobs += piece.logprobs
        self.generated, self.finish_reason = piece.generated, piece.finish_reason


@dataclass
class Answer(ABC):
    """One request's answer, in the making. `prompt_tokens` is over all prompts; `logprobs` whether they were asked for."""

    model: str
    count: int
    prompt_tokens: int
    logprobs: bool

    kind = ""  # the `object` of a whole answer
    chunk_kind = ""  # and of a stream's chunks
    id_prefix = ""

    def __post_init__(self) -> None:
        self._id, self._created = self.id_prefix + uuid.uuid4().hex, int(time.time())
        self._choices = [Collected() for _ in range(self.count)]

    async def whole(self, replies: Replies) -> dict[str, Any]:
        """The answer when it is complete. Raises ApiError when a reply failed."""
        async for index, piece in replies.pieces():
            self._choices[index].add(piece)
        choices = [self._whole_choice(index, choice) for index, choice in enumerate(self._choices)]
        return {**self._head(self.kind), "choices": choices, "usage": self._usage()}

    async def chunks(self, replies: Replies, usage: bool) -> AsyncIterator[dict[str, Any]]:
        """The answer piece by piece; with `usage` a last chunk that has it. A failed reply ends it with an error."""
        extra = {"usage": None} if usage else {}
        head = {**self._head(self.chunk_kind), **extra}
        for choice in self._first_choices():
            yield {**head, "choices": [choice]}
        try:
            async for index, piece in replies.pieces():
                choice = self._choices[index]
                before = len(choice.text)
                choice.add(piece)
                yield {**head, "choices": self._chunk_choices(index, piece, before)}
        except ApiError as error:
            yield error.body
            return
        if usage:
            yield {**head, "choices": [], "usage": self._usage()}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.model}

    def _usage(self) -> dict[str, int]:
        generated = sum(choice.generated for choice in self._choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.prompt_tokens + generated,
        }

    def _first_choices(self) -> list[dict[str, Any]]:
        return []

    @abstractmethod
    def _whole_choice(self, index: int, choice: Collected) -> dict[str, Any]: ...

    @abstractmethod
    def _chunk_choices(self, index: int, piece: Piece, offset: int) -> list[dict[str, Any]]: ...


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    kind, chunk_kind, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def _whole_choice(self, index: int, choice: Collected) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        logprobs = self._logprobs(choice.logprobs)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def _first_choices(self) -> list[dict[str, Any]]:
        first = {"role": "assistant", "content": ""}
        return [{"index": i, "delta": first, "logprobs": None, "finish_reason": None} for i in range(self.count)]

    def _chunk_choices(self, index: int, piece: Piece, offset: int) -> list[dict[str, Any]]:
        choices = []
        if piece.text or piece.logprobs:
            delta, logprobs = {"content": piece.text}, self._logprobs(piece.logprobs)
            choices.append({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None})
        if piece.finish_reason:
            choices.append({"index": index, "delta": {}, "logprobs": None, "finish_reason": piece.finish_reason})
        return choices

    def _logprobs(self, logprobs: Any) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        entries = [
            {**_token(item.token, item.logprob), "top_logprobs": [_token(*top) for top in item.top.items()]}
            for item in logprobs
        ]
        return {"content": entries, "refusal": None}


@dataclass
class CompletionAnswer(Answer):
    """Of /v1/completions. `echoes`: what each choice's text begins with."""

    echoes: list[str]

    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl-"

    def _whole_choice(self, index: int, choice: Collected) -> dict[str, Any]:
        text = self.echoes[index] + choice.text
        return self._choice(index, text, choice.logprobs, choice.finish_reason, 0)

    def _chunk_choices(self, index: int, piece: Piece, offset: int) -> list[dict[str, Any]]:
        return [self._choice(index, piece.text, piece.logprobs, piece.finish_reason, offset)]

    def _choice(self, index: int, text: str, logprobs: Any, reason: str | None, offset: int) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(logprobs, offset),
            "finish_reason": reason,
        }

    def _logprobs(self, logprobs: Any, offset: int) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        offsets = []
        for item in logprobs:
            offsets.append(offset)
            offset += len(item.token)
        return {
            "tokens": [item.token for item in logprobs],
            "token_logprobs": [item.logprob for item in logprobs],
            "top_logprobs": [None if item.logprob is None else item.top for item in logprobs],
            "text_offset": offsets,
        }


def _token(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
