"""Continuous batching: one thread owns the model; sequences join after their prompt pass and leave when done.

A turn of the loop is: drop what was cancelled, admit what waits, take in one chunk of one prompt, then one token for every
running sequence. So a long prompt delays the running replies by one chunk a token, prompts take turns, and nobody waits
for a batch to end.
"""

import copy
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foregate.config import ServeConfig
from foregate.errors import ForegateError
from foregate.serve.metrics import Metrics
from foregate.serve.runner import Runner
from foregate.serve.sequence import Order, Piece, Sequence, end_tokens

log = logging.getLogger("foregate.serve")


class Overloaded(Exception):
    """Every place is taken."""


class Batcher:
    """Serves orders, at most `max_running` at a time with `max_waiting` in a queue. Methods may be called by any thread."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_running: int = ServeConfig.max_running,
        max_waiting: int = ServeConfig.max_waiting,
        prompt_chunk: int = ServeConfig.prompt_chunk,
        metrics: Metrics | None = None,
    ) -> None:
        self._runner = Runner(model, prompt_chunk)
        self.max_running = max_running if self._runner.joins else 1
        self.places = self.max_running + max_waiting
        self.metrics = metrics or Metrics()
        self._tokenizer = copy.deepcopy(tokenizer)  # of this thread alone
        self._end_tokens = end_tokens(model)
        self._changed = threading.Condition()
        self._taken = 0  # places reserved and not yet given back
        self._waiting: deque[Sequence] = deque()
        self._prompts: deque[Sequence] = deque()  # admitted, their prompts not yet taken in
        self._running: list[Sequence] = []  # in the order of the runner's rows
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="foregate-batcher", daemon=True)
        self._thread.start()

    def reserve(self, count: int) -> None:
        """Take places for `count` orders, to be given to `submit` or back to `release`. Raises Overloaded."""
        with self._changed:
            if self._taken + count > self.places or self._closing:
                raise Overloaded
            self._taken += count

    def release(self, count: int) -> None:
        """Give back places that were reserved and not used."""
        with self._changed:
            self._taken -= count

    def submit(self, order: Order, emit: Callable[[Piece], None]) -> Sequence:
        """Queue an order in a reserved place, which is given back when its last piece is out or it is cancelled."""
        sequence = Sequence(order, emit, self._tokenizer, self._end_tokens)
        with self._changed:
            self._waiting.append(sequence)
            self._changed.notify()
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Stop working on a sequence; it emits nothing more. No effect on one that is done."""
        with self._changed:
            sequence.cancelled = True
            self._changed.notify()

    def load(self) -> dict[str, int]:
        """How many sequences run (their prompts being taken in or replies being made) and how many wait."""
        return {"running": len(self._running) + len(self._prompts), "waiting": len(self._waiting)}

    def close(self) -> None:
        """End the thread after its current turn; unfinished replies end with an error."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    # -- the loop, in its own thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._await_work():
            try:
                self._turn()
            except Exception as error:
                log.exception("a pass of the model failed")
                message = str(error) if isinstance(error, ForegateError) else f"the model failed: {error}"
                self._fail_all([*self._running, *self._prompts], message)
        self._fail_all([*self._running, *self._prompts, *self._waiting], "the server is shutting down")

    def _turn(self) -> None:
        self._drop_cancelled()
        self._admit()
        if self._prompts:
            self._advance_prompt(self._prompts[0])
        if self._running:
            self._step()

    def _await_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._waiting or self._prompts or self._running)
            return not self._closing

    def _drop_cancelled(self) -> None:
        with self._changed:
            gone = [s for s in (*self._running, *self._prompts, *self._waiting) if s.cancelled]
        self._end(gone)
        for _ in gone:
            self.metrics.finished("cancelled")

    def _admit(self) -> None:
        with self._changed:
            while self._waiting and len(self._running) + len(self._prompts) < self.max_running:
                self._prompts.append(self._waiting.popleft())

    def _advance_prompt(self, sequence: Sequence) -> None:
        before = sequence.progress.cached
        logits = self._runner.advance_prompt(sequence.progress, all_logits=sequence.order.prompt_logprobs)
        self.metrics.prompt_tokens.inc(sequence.progress.cached - before)
        if sequence.order.prompt_logprobs:
            sequence.note_prompt(logits)
        if sequence.progress.prompt_left:
            self._prompts.rotate(-1)
            return
        self.metrics.first_token.observe(time.perf_counter() - sequence.arrived)
        if self._advance([sequence], logits[-1:]):
            return
        self._runner.join(sequence.progress)
        self._running.append(self._prompts.popleft())

    def _step(self) -> None:
        start = time.perf_counter()
        logits = self._runner.step()
        self.metrics.step.observe(time.perf_counter() - start)
        self._advance(list(self._running), logits)

    def _advance(self, sequences: list[Sequence], logits: torch.Tensor) -> bool:
        """The next token of these sequences, by logits [sequences, vocabulary]; true when all are done with it."""
        self.metrics.generated(len(sequences))
        pieces = [(s, _next_piece(s, row)) for s, row in zip(sequences, logits, strict=True) if not s.cancelled]
        done = [sequence for sequence, piece in pieces if piece is not None and piece.last]
        self._end(done)  # before its client knows: the next request finds the place free
        for sequence, piece in pieces:
            if piece is not None:
                sequence.emit(piece)
                if piece.last:
                    self.metrics.finished("failed" if piece.error else "done")
        return len(done) == len(sequences)

    def _end(self, sequences: list[Sequence]) -> None:
        """Take these sequences out of wherever they are, and give back their places."""
        if not sequences:
            return
        gone = {id(sequence) for sequence in sequences}
        self._runner.leave([sequence.progress for sequence in sequences])
        self._running = [s for s in self._running if id(s) not in gone]
        with self._changed:
            self._prompts = deque(s for s in self._prompts if id(s) not in gone)
            self._waiting = deque(s for s in self._waiting if id(s) not in gone)
        self.release(len(sequences))

    def _fail_all(self, sequences: list[Sequence], message: str) -> None:
        self._runner.reset()
        self._running = []
        with self._changed:
            self._prompts.clear()
            if self._closing:
                self._waiting.clear()
        self.release(len(sequences))
        for sequence in sequences:
            sequence.emit(Piece(generated=sequence.generated, error=message))
            self.metrics.finished("failed")


def _next_piece(sequence: Sequence, logits: torch.Tensor) -> Piece | None:
    """The sequence's piece after these logits [vocabulary]. What goes wrong here is its own affair, not the others'."""
    try:
        return sequence.advance(logits)
    except Exception as error:
        log.exception("choosing a token failed")
        return Piece(generated=sequence.generated, error=f"choosing a token failed: {error}")
