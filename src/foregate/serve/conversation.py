"""One chat without a server: its history, kept within the context, and the KV cache kept from turn to turn.

The passes are the server's (`runner.py`). Of what a turn's prompt shares with the tokens that were computed before,
nothing is computed again.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foregate.config import ChatConfig, ServeConfig
from foregate.errors import ForegateError
from foregate.serve import caches
from foregate.serve.runner import Progress, Runner
from foregate.serve.sampling import Sampling
from foregate.serve.sequence import Order, Sequence, end_tokens
from foregate.serve.template import PLAIN_STOPS, PLAIN_TEMPLATE, TemplateRefusal, chat_tokens

Message = dict[str, str]  # role and content


@dataclass(frozen=True)
class Style:
    """How replies are made. template: Jinja text; None is the model's own."""

    system: str | None = None
    template: str | None = None
    max_new_tokens: int = ChatConfig.max_new_tokens
    context: int = ChatConfig.context  # tokens of prompt and reply together
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Reply:
    """What came of a turn. Times in seconds."""

    text: str
    stopped: bool  # by who asked, before it was complete
    prompt_tokens: int
    reused_tokens: int  # of the prompt: computed in an earlier turn
    new_tokens: int
    first_token_seconds: float
    decode_seconds: float
    forgotten: int  # messages that left the history

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding; the first token comes from the prompt's pass."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 and self.decode_seconds else None


class Conversation:
    """A chat with a model loaded by `foregate.load`. Not thread-safe."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, style: Style) -> None:
        """Raises ForegateError for a model without a chat template where the style brings none."""
        if style.template is None and not tokenizer.chat_template:
            raise ForegateError(
                f"{model.name_or_path} has no chat template: name one with --template FILE, or write turns as lines "
                '"role: content" with --template plain'
            )
        self._tokenizer, self._style = tokenizer, style
        self._runner = Runner(model, ServeConfig.prompt_chunk)
        self._ends = end_tokens(model)
        self._computed = Progress([])
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message, which need not be computed again."""
        system = self._style.system
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self._turns = 0

    def say(self, message: str, emit: Callable[[str], None], stop: Callable[[], bool] = lambda: False) -> Reply:
        """Reply to a message, passing text to `emit` as it comes, until done or `stop` says so between two passes.

        A stopped reply stays in the history as far as it came; without any text the message is forgotten. Raises
        ForegateError for a message that the context or the template has no room for: the history is as before.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": message})
        try:
            prompt, forgotten = self._fit()
            reply = self._reply(prompt, forgotten, emit, stop)
        except BaseException:
            self.messages = before
            raise
        if reply.text.strip():
            self.messages.append({"role": "assistant", "content": reply.text.strip()})
        else:
            self.messages = before
        return reply

    def _fit(self) -> tuple[list[int], int]:
        """The prompt, after the oldest turns have left the history for it to fit; and how many messages did."""
        room = self._style.context - min(self._style.max_new_tokens, self._style.context // 2)
        start, forgotten = int(bool(self._style.system)), 0
        while len(prompt := self._encode()) > room:
            turn = self._oldest_turn(start)
            if not turn:
                raise ForegateError(
                    f"the message has {len(prompt)} tokens with all around it and the context leaves {room} beside the "
                    "reply: shorten it, or lower --max-new-tokens"
                )
            del self.messages[start : start + turn]
            forgotten += turn
        return prompt, forgotten

    def _oldest_turn(self, start: int) -> int:
        """How many messages the turn at `start` has; 0 when it is the last one."""
        later = (i for i in range(start + 1, len(self.messages)) if self.messages[i]["role"] == "user")
        return next(later, start) - start

    def _encode(self) -> list[int]:
        try:
            return chat_tokens(self._tokenizer, self.messages, template=self._style.template)
        except UnicodeEncodeError:
            raise ForegateError("the message is not UTF-8 text: convert it first") from None
        except TemplateRefusal as refusal:
            raise ForegateError(f"the chat template refuses the messages: {refusal}") from None

    def _reply(self, prompt: list[int], forgotten: int, emit: Callable[[str], None], stop: Callable[[], bool]) -> Reply:
        sampling, self._turns = self._sampling(), self._turns + 1
        room = min(self._style.max_new_tokens, self._style.context - len(prompt))
        stops = PLAIN_STOPS if self._style.template == PLAIN_TEMPLATE else ()
        sequence = Sequence(
            Order(tuple(prompt), room, sampling, stops), lambda piece: None, self._tokenizer, self._ends
        )
        sequence.progress, self._computed = self._resume(prompt), Progress([])  # lost if a pass fails
        reused, text, times = sequence.progress.cached, "", [time.perf_counter()]
        while not (stopped := stop()):
            logits = self._runner.advance_prompt(sequence.progress)
            if sequence.progress.prompt_left:
                continue
            piece = sequence.advance(logits[-1])
            times.append(time.perf_counter())
            if piece:
                text += piece.text
                emit(piece.text)
                if piece.last:
                    break
        self._computed = sequence.progress
        first = times[min(1, len(times) - 1)]
        return Reply(
            text, stopped, len(prompt), reused, sequence.generated, first - times[0], times[-1] - first, forgotten
        )

    def _resume(self, prompt: list[int]) -> Progress:
        """The prompt with what its beginning shares with the tokens computed last; its last token is always computed."""
        held = self._computed
        known = held.tokens[: held.cached]
        same = next((i for i, pair in enumerate(zip(known, prompt, strict=False)) if pair[0] != pair[1]), len(known))
        same = min(same, len(prompt) - 1)
        if held.cache is None or not same or not caches.can_join(held.cache):  # recurrent states start anew
            return Progress(list(prompt))
        if same < held.cached:
            if not caches.can_cut(held.cache):
                return Progress(list(prompt))
            caches.cut(held.cache, same)
        return Progress(list(prompt), same, held.cache)

    def _sampling(self) -> Sampling:
        """Each turn draws other numbers; all of them follow from the seed."""
        style = self._style.sampling
        return style if style.seed is None else replace(style, seed=style.seed + self._turns)
