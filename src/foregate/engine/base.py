"""What all engines share: scheduler, link, predictions, failures. An engine runs one MoE layer at a time, experts in slots."""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from foregate.checkpoint.store import Store
from foregate.errors import ForegateError
from foregate.kernels import choose_kernel
from foregate.memory.budget import Budget
from foregate.memory.carrier import Carrier
from foregate.memory.link import Finished, Link
from foregate.report import Recorder
from foregate.schedule import (
    Action,
    Call,
    Cancel,
    Compute,
    Hurry,
    Load,
    Prediction,
    Route,
    Scheduler,
    Shape,
    make_scheduler,
)

WAIT_SECONDS = 120.0  # a link that finishes nothing for so long is reported, not waited for


class Predictor(Protocol):
    """What watches the model's routers and says what their successors will choose."""

    def routed(self, layer: int, chosen: torch.Tensor) -> None:
        """The router of `layer` chose these experts: int [tokens, top_k]. Called for every layer in turn."""

    def predict(self, layer: int) -> Prediction | None:
        """What follows the call of `layer` that `routed` was just told of."""

    def take(self, layer: int) -> tuple[torch.Tensor, ...]:
        """What was seen of the router of `layer` in the call to come, [tokens, ...] each, on the model's device."""

    def give(self, layer: int, seen: Sequence[torch.Tensor]) -> None:
        """The same in host memory, of the last tokens alone: what `routed`, called next, is about."""


class Captured(Protocol):
    """A backbone whose decode steps were captured: its KV cache has to stay where it is."""

    @property
    def note(self) -> str:
        """What of it was captured, and what runs eagerly."""


class Engine(ABC):
    """Ties scheduler, slots, link and kernel together for one model. An implementation computes.

    The output does not depend on policy, budget or predictions: they only decide when bytes move. One layer runs at a
    time, whichever thread asks. The link's threads report every end of a load at once, so that the next one starts
    while the model computes: scheduler and recorder are only used under `_state`.
    """

    def __init__(
        self,
        store: Store,
        budget: Budget,
        *,
        policy: str,
        readers: int,
        kernel: str,
        exact: bool,
        link_bandwidth: float | None = None,
        link_latency: float = 0.0,
        future: Sequence[Route] | None = None,
    ) -> None:
        self.store, self.budget, self.policy, self.exact = store, budget, policy, exact
        self.kernel, self.kernel_note = choose_kernel(kernel)
        self.recorder = Recorder([layer.num_experts for layer in store.layers])
        self.backbone: Captured | None = None  # None: it runs eagerly
        self._readers, self._future = readers, future
        self._link_bandwidth, self._link_latency = link_bandwidth, link_latency
        self._predictor: Predictor | None = None
        self._turn = threading.RLock()  # one layer at a time
        self._state = threading.Condition()  # signalled when a load has ended
        self._failure: BaseException | None = None
        self._closed = self._link_lost = False
        self._calls: list[Call] | None = None
        self._before: Prediction | None = None  # of the next call
        self.scheduler = self._new_scheduler()
        self._link = self._open_link()

    @abstractmethod
    def connect(self, modules: list[nn.Module]) -> None:
        """Tell the engine the model's experts modules, one a layer: they say how gate and up combine."""

    @abstractmethod
    def _run_layer(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The step: `run_layer` without its precautions."""

    @abstractmethod
    def _make_slots(self) -> Carrier:
        """Slots, all empty, and what carries records into them. Raises ForegateError if there is no room."""

    def follow(self, predictor: Predictor) -> None:
        """Have the scheduler told what this predictor expects."""
        self._predictor = predictor

    @property
    def direct_reads(self) -> bool:
        """Whether records are read past the page cache."""
        return self._link.path == "direct"

    @property
    def kernel_summary(self) -> str:
        """What computes experts, and why that."""
        return f"{self.kernel.name} ({self.kernel_note})"

    @property
    def device_facts(self) -> dict[str, Any]:
        """Where experts are computed and how they get there, for the report."""
        return {"name": "cpu", "path": self._link.path}

    @property
    def link(self) -> Link:
        """What carries records into slots."""
        return self._link

    @property
    def listens(self) -> bool:
        """Whether the policy has use for predictions now."""
        return self.scheduler.wants_predictions()

    @property
    def wants_guess(self) -> bool:
        """Whether the policy would hear what the next layer's own router expects after the layer at work."""
        return self.scheduler.wants_guess()

    def settle(self) -> None:  # noqa: B027 - most have nothing left to do
        """Take account of everything that was computed: an engine may be a few layers behind with it.

        Raises what `run_layer` would have raised; the next call of a layer then starts with empty slots.
        """

    def record_calls(self) -> list[Call]:
        """From now on every call of a layer is added to this list, with what was predicted around it."""
        self._calls = []
        return self._calls

    def expect(self, prediction: Prediction) -> None:
        """Pass on a prediction that came from elsewhere than a layer's router, such as a sampled token's embedding."""
        with self._state:
            if self._failure is not None:  # the next layer will say so, or open the link again
                return
            self._note(prediction)
            self.recorder.predicted(prediction)
            self._carry_out(self.scheduler.predicted(prediction, time.perf_counter()))

    def run_layer(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """What the routed experts of MoE layer `layer` add: sum over k of weight * expert(hidden).

        hidden: [tokens, hidden]; top_k_index, top_k_weights: [tokens, k]. Returns [tokens, hidden]. Raises
        ForegateError when a record cannot be read, and whatever the policy raises, on the link's thread too; after any
        error the next call starts with empty slots.
        """
        with self._turn:
            if self._link_lost:
                self._link, self._link_lost, self._failure = self._open_link(), False, None
            try:
                return self._run_layer(layer, hidden.contiguous(), top_k_index, top_k_weights)
            except BaseException:
                self._start_anew()
                raise

    def close(self) -> None:
        """End the link's threads. The model cannot run afterwards."""
        with self._turn:
            with self._state:
                self._closed = True
                self._failure = None
                self._give_up("this model was closed: load it again")
            self._link.close()

    # -- what a step is made of -----------------------------------------------------------------------------------

    def _route(self, layer: int, experts: list[int], tokens: int) -> None:
        with self._state:
            if self._failure is not None:
                raise self._failure
            resident = self._resident(layer, experts)
            actions = self.scheduler.routed(layer, experts, time.perf_counter(), tokens)
            on_host = {action.key[1] for action in actions if isinstance(action, Compute)}
            self.recorder.routed(layer, experts, resident, tokens, on_host)
            if self._calls is not None:
                self._calls.append(Call(layer, tuple(experts), tokens, before=self._before))
                self._before = None
            self._carry_out(actions)

    def _predict(self, layer: int, chosen: torch.Tensor) -> None:
        if self._predictor is None:
            return
        self._predictor.routed(layer, chosen)
        if self.listens and (prediction := self._predictor.predict(layer)):
            self.expect(prediction)

    def _note(self, prediction: Prediction) -> None:
        if self._calls is not None and prediction.token:
            self._before = prediction
        elif self._calls:
            self._calls[-1] = replace(self._calls[-1], after=prediction)

    def _await_resident(self, layer: int, waiting: Iterable[int]) -> list[int]:
        """Those of the experts that can be computed now; waits until there is one."""
        with self._state:
            ready, start = self._resident(layer, waiting), time.perf_counter()
            if ready:
                return ready
            while not ready:
                if self._failure is not None:
                    raise self._failure
                if not self._state.wait(WAIT_SECONDS):
                    raise ForegateError(f"{self.store.experts_path}: no answer from the disk in {WAIT_SECONDS:g} s")
                ready = self._resident(layer, waiting)
            seconds = time.perf_counter() - start
            self.recorder.stalled(layer, seconds)
            self.scheduler.waited(seconds)
            return ready

    def _resident(self, layer: int, experts: Iterable[int]) -> list[int]:
        return [expert for expert in experts if self.scheduler.is_resident((layer, expert))]

    def _release(self, layer: int, experts: list[int]) -> None:
        with self._state:
            self._carry_out(self.scheduler.computed([(layer, expert) for expert in experts], time.perf_counter()))

    # -- the link -------------------------------------------------------------------------------------------------

    def _carry_out(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Load():
                    self.recorder.submitted(action)
                    self._link.submit(action)
                    self._in_flight += 1
                case Hurry():
                    self._link.hurry(action.key)
                case Cancel():
                    self._link.cancel(action.key)

    def _ended(self, finished: Finished, carrier: Carrier) -> None:
        """A load has ended, well or not. Runs in a thread of the link; an error is raised where the next layer runs."""
        with self._state:
            if carrier is not self._carrier:
                return  # the answer of a link that was given up
            self._in_flight -= 1
            self._failure = self._failure or finished.error
            try:
                self._tell_of_end(finished)
            except BaseException as failure:
                self._failure = self._failure or failure
            self._state.notify_all()

    def _tell_of_end(self, finished: Finished) -> None:
        self.recorder.loaded(finished)
        if self._failure is not None:
            return
        now = time.perf_counter()
        if finished.dropped:
            self._carry_out(self.scheduler.dropped(finished.key, now))
        else:
            self._carry_out(self.scheduler.arrived(finished.key, finished.seconds, now))

    def _open_link(self) -> Link:
        self._in_flight = 0  # loads whose end was not heard of yet
        carrier = self._carrier = self._make_slots()
        return Link(
            carrier,
            slots=self.scheduler.slots,
            record_bytes=lambda key: self.store.location(key)[1],
            readers=self._readers,
            finished=lambda finished: self._ended(finished, carrier),
            bandwidth=self._link_bandwidth,
            latency=self._link_latency,
        )

    def _new_scheduler(self) -> Scheduler:
        layers = self.store.layers
        shape = Shape(tuple(layer.num_experts for layer in layers), tuple(layer.top_k for layer in layers))
        return make_scheduler(self.policy, self.budget.slots, shape, self._future)

    def _start_anew(self) -> None:
        """After an error or an interruption: nothing in flight may land in memory that is used again."""
        with self._state:
            if self._closed:
                return
            self._give_up("this run was given up")
            idle = self._state.wait_for(lambda: not self._in_flight, WAIT_SECONDS)
            self.scheduler = self._new_scheduler()
            self.recorder.emptied()
            if idle:
                self._failure = None
            else:  # the disk hangs
                self._link.close_later()
                self._link_lost = True

    def _give_up(self, why: str) -> None:
        """Start no load any more, and drop those in flight."""
        self._failure = self._failure or ForegateError(why)
        for key in self.scheduler.in_flight():
            self._link.cancel(key)


class Places(NamedTuple):
    """Where an expert was chosen, int64 [n] each."""

    tokens: torch.Tensor  # rows of the input
    rows: torch.Tensor  # positions in the flattened [tokens, k] index


def places_by_expert(top_k_index: torch.Tensor, num_experts: int) -> dict[int, Places]:
    """For each chosen expert of `top_k_index` [tokens, k], ascending: where it was chosen.

    Indices outside 0..num_experts-1 are a family's way to say "no expert" and are left out.
    """
    flat, top_k = top_k_index.reshape(-1), top_k_index.shape[-1]
    if len(flat) == top_k == len(set(experts := flat.tolist())):  # a decode step: tensor operations would take longer
        return {
            e: place for e, place in sorted(zip(experts, _of_one_token(top_k), strict=True)) if 0 <= e < num_experts
        }
    order = torch.argsort(flat, stable=True)
    chosen, counts = torch.unique_consecutive(flat[order], return_counts=True)
    sizes = counts.tolist()
    places = map(Places, (order // top_k).split(sizes), order.split(sizes))
    return {e: place for e, place in zip(chosen.tolist(), places, strict=True) if 0 <= e < num_experts}


@cache
@torch.inference_mode(False)  # whoever comes first, others may want gradients
def _of_one_token(top_k: int) -> list[Places]:
    token = torch.zeros(1, dtype=torch.int64)
    return [Places(token, row) for row in torch.arange(top_k).split(1)]
