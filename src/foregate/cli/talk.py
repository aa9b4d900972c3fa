"""The loop of `foregate chat`: lines from a person or a pipe, commands, replies that ctrl-C stops."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator

from foregate.engine import Engine
from foregate.errors import ForegateError
from foregate.serve.conversation import Conversation, Reply

HELP = """\
/reset  forget the conversation      /stats  speed, hits and what is in memory
/help   this                         /exit   end, as ctrl-D does
A line that ends with \\ goes on in the next one. Ctrl-C stops a reply."""
MIB = 2**20


class Talk:
    """A conversation at a terminal, or, not `interactive`, with whatever writes lines into stdin."""

    def __init__(self, conversation: Conversation, engine: Engine, interactive: bool) -> None:
        self._conversation, self._engine, self._interactive = conversation, engine, interactive
        self._last: Reply | None = None
        self._commands: dict[str, Callable[[], None]] = {
            "/help": lambda: _note(HELP),
            "/reset": self._reset,
            "/stats": self._stats,
        }

    def run(self) -> None:
        """Until /exit or the end of input. Raises ForegateError for a message that cannot be answered in a pipe."""
        if self._interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  lends `input` its line editing
            _note("/help says what can be typed here; ctrl-D ends")
        for message in iter(self._read, None):
            command = message.strip()
            if command == "/exit":
                return
            if command in self._commands:
                self._commands[command]()
            elif command.startswith("/") and "\n" not in command and " " not in command:
                _note(f"{command} is no command: /help lists them")
            elif command:
                self._answer(message)

    def _read(self) -> str | None:
        """The next message, its lines joined; None at the end of input."""
        lines: list[str] = []
        while True:
            try:
                line = input(("... " if lines else ">>> ") if self._interactive else "")
            except EOFError:
                if self._interactive:
                    print()
                return "\n".join(lines) if lines else None
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                _note("\nctrl-D or /exit ends")
                lines.clear()
                continue
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def _answer(self, message: str) -> None:
        try:
            with _interrupts() as stop:
                reply = self._conversation.say(message, _write, stop)
        except ForegateError as error:
            if not self._interactive:
                raise
            _note(f"foregate: {error}")
            return
        _write("\n")
        self._last = reply
        if reply.stopped:
            _note("(stopped)")
        if reply.forgotten:
            _note(f"(the context is full: the oldest {reply.forgotten} messages were forgotten)")

    def _reset(self) -> None:
        self._conversation.reset()
        _note("the conversation is forgotten")

    def _stats(self) -> None:
        for name, value in self._figures().items():
            _note(f"{name:<12} {value}")

    def _figures(self) -> dict[str, str]:
        store, totals = self._engine.store, self._engine.recorder.totals()
        keys = ((layer, e) for layer, info in enumerate(store.layers) for e in range(info.num_experts))
        resident = sum(self._engine.scheduler.is_resident(key) for key in keys)
        routed = totals.hits + totals.misses
        figures = {"last reply": _speed(self._last)} if self._last else {}
        return figures | {
            "hits": f"{totals.hits:,} of {routed:,} ({totals.hits / routed:.1%})" if routed else "-",
            "bytes read": f"{totals.bytes_read / MIB:,.1f} MiB, waited {totals.stall_seconds:.2f} s for them",
            "in memory": f"{resident:,} of {store.num_experts:,} experts, {resident * store.record_bytes / MIB:,.1f} MiB; "
            f"policy {self._engine.policy}",
        }


def _speed(reply: Reply) -> str:
    speed = f"{reply.tokens_per_second:.1f} tokens/s, " if reply.tokens_per_second else ""
    return (
        f"{reply.new_tokens} tokens, {speed}the first after {reply.first_token_seconds:.2f} s; prompt of "
        f"{reply.prompt_tokens} tokens, {reply.reused_tokens} of them computed before"
    )


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C becomes a question: whether it was pressed. So it never falls into the middle of a pass of the model."""
    pressed: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, previous)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
