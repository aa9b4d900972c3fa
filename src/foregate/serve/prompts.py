"""From what a request says to the tokens the model is given."""

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from foregate.serve.errors import ApiError
from foregate.serve.schemas import ChatRequest, CompletionRequest, Message
from foregate.serve.template import PLAIN_TEMPLATE, TemplateRefusal, chat_tokens


class Encoder:
    """Makes prompts. `context`: tokens of prompt and reply together."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, context: int) -> None:
        self.tokenizer, self.vocabulary, self.context = tokenizer, vocabulary, context

    @property
    def has_template(self) -> bool:
        """Whether the model brings a chat template; otherwise `PLAIN_TEMPLATE` is used."""
        return bool(self.tokenizer.chat_template)

    def chat(self, body: ChatRequest) -> list[int]:
        """A chat as tokens. Raises ApiError for one that the template refuses, or that is too long."""
        tools = None if body.tool_choice == "none" or not body.tools else [tool.model_dump() for tool in body.tools]
        messages = [_for_template(message) for message in body.messages]
        template = None if self.has_template else PLAIN_TEMPLATE
        try:
            ids = chat_tokens(self.tokenizer, messages, template=template, tools=tools)
        except TemplateRefusal as refusal:
            raise ApiError(
                400, f"the model's chat template refuses these messages: {refusal}", param="messages"
            ) from None
        except UnicodeEncodeError:
            raise _no_unicode("messages") from None
        return self._checked(ids, "messages")

    def prompts(self, body: CompletionRequest) -> list[list[int]]:
        """Each prompt as tokens. Raises ApiError for one that is empty, too long, or has unknown tokens."""
        every = (prompt if isinstance(prompt, list) else self._tokens(prompt, "prompt") for prompt in body.prompts)
        return [self._checked(ids, "prompt") for ids in every]

    def room(self, prompt: list[int], wanted: int | None) -> int:
        """How many tokens a reply may have: what is wanted, and no more than the context leaves."""
        left = self.context - len(prompt)
        return left if wanted is None else min(wanted, left)

    def _tokens(self, text: str, param: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _no_unicode(param) from None
        return self.tokenizer(text, verbose=False)["input_ids"]

    def _checked(self, ids: list[int], param: str) -> list[int]:
        if not ids:
            raise ApiError(400, f"{param}: the prompt is empty, give at least one character", param=param)
        if len(ids) >= self.context:
            raise ApiError(
                400,
                f"{param}: the prompt has {len(ids)} tokens and the context holds {self.context}, prompt and reply "
                "together: shorten it",
                param=param,
                code="context_length_exceeded",
            )
        if max(ids) >= self.vocabulary:
            raise ApiError(400, f"{param}: token {max(ids)} is not one of the model's {self.vocabulary}", param=param)
        return ids


def _no_unicode(param: str) -> ApiError:
    return ApiError(400, f"{param}: half of a surrogate pair is no unicode text", param=param)


def _for_template(message: Message) -> dict[str, Any]:
    """A message as templates expect it: content as text, a call's arguments as an object."""
    turn: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.text,
    }
    for name in ("name", "tool_call_id"):
        if getattr(message, name) is not None:
            turn[name] = getattr(message, name)
    if message.tool_calls:
        turn["tool_calls"] = [call.model_dump() for call in message.tool_calls]
        for call in turn["tool_calls"]:
            call["function"]["arguments"] = _arguments(call["function"]["arguments"])
    return turn


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
