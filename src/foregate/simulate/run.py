"""The engine's step with time added up instead of spent, around the very scheduler objects the engine uses."""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field, replace

from foregate.schedule import Action, Call, Cancel, Hurry, Load, Prediction, Scheduler
from foregate.schedule.base import Prefetches
from foregate.simulate.link import Transfer, VirtualLink
from foregate.simulate.machine import Machine


@dataclass
class Outcome:
    """What a simulated run took and did."""

    tokens: int = 0
    seconds: float = 0.0
    hits: int = 0
    misses: int = 0  # not resident when routed, prefetches under way among them
    loads: int = 0
    stall_seconds: float = 0.0
    link_seconds: float = 0.0  # that the link has worked
    compute_seconds: float = 0.0
    prefetches: Prefetches = field(default_factory=Prefetches)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def hit_rate(self) -> float | None:
        routed = self.hits + self.misses
        return self.hits / routed if routed else None

    @property
    def stall_share(self) -> float:
        """Of the time, standing still for loads."""
        return self.stall_seconds / self.seconds if self.seconds else 0.0

    @property
    def link_share(self) -> float:
        """Of the time, with the link at work."""
        return self.link_seconds / self.seconds if self.seconds else 0.0


def run(calls: Iterable[Call], scheduler: Scheduler, machine: Machine, warm_up: int = 0) -> Outcome:
    """Simulate the calls. Tokens are counted at layer 0; the first `warm_up` of them are run and not counted.

    Times that calls and predictions took when they were recorded do not count: the machine says what they take.
    """
    simulation, tokens = _Run(scheduler, machine), 0
    for call in calls:
        if call.layer == 0:
            if tokens == warm_up:
                simulation.count_from_here()
            tokens += 1
        simulation.call(call)
    return simulation.outcome_of(tokens - warm_up) if tokens > warm_up else Outcome()


class _Run:
    """`call` is the engine's step. The link's clock never runs behind the processor's when the scheduler is asked."""

    def __init__(self, scheduler: Scheduler, machine: Machine) -> None:
        self.scheduler, self.machine = scheduler, machine
        self.link, self.now = VirtualLink(machine, self.ended), 0.0
        self.count_from_here()

    def count_from_here(self) -> None:
        self.outcome, self.started_at = Outcome(), self.now
        self.busy_before, self.prefetches_before = self.link.busy_seconds, replace(self.scheduler.prefetches)

    def outcome_of(self, tokens: int) -> Outcome:
        outcome = self.outcome
        outcome.tokens, outcome.seconds = tokens, self.now - self.started_at
        outcome.link_seconds = self.link.busy_seconds - self.busy_before
        pairs = zip(astuple(self.scheduler.prefetches), astuple(self.prefetches_before), strict=True)
        outcome.prefetches = Prefetches(*(after - before for after, before in pairs))
        return outcome

    def call(self, call: Call) -> None:
        machine, layer = self.machine, call.layer
        if layer == 0:
            self.compute(machine.token_seconds - machine.start_seconds)
            self.predict(call.before)
            self.compute(machine.start_seconds)
        self.compute(machine.layer_seconds)
        self.count(call)
        self.carry_out(self.scheduler.routed(layer, call.experts, self.now, call.tokens))
        self.link.advance(self.now)
        self.predict(call.after)
        waiting = list(call.experts)
        while waiting:
            ready = self.await_resident(layer, waiting)
            waiting = [expert for expert in waiting if expert not in ready]
            self.compute(machine.call_seconds + machine.expert_seconds * len(ready))
            self.carry_out(self.scheduler.computed([(layer, expert) for expert in ready], self.now))
        self.link.advance(self.now)

    def predict(self, prediction: Prediction | None) -> None:
        if prediction is not None and self.scheduler.wants_predictions():
            self.compute(self.machine.gate_seconds)
            known = replace(prediction, seconds=self.machine.gate_seconds)
            self.carry_out(self.scheduler.predicted(known, self.now))
            self.link.advance(self.now)

    def compute(self, seconds: float) -> None:
        """The processor works, and the link beside it."""
        self.now += seconds
        self.outcome.compute_seconds += seconds
        self.link.advance(self.now)

    def await_resident(self, layer: int, waiting: Sequence[int]) -> list[int]:
        """Those of the experts that can be computed now; time passes until there is one."""
        start = self.now
        while not (ready := [expert for expert in waiting if self.scheduler.is_resident((layer, expert))]):
            if not self.link.step():
                raise RuntimeError("deadlock: nothing is resident and nothing on its way")
            self.now = self.link.now
        if self.now > start:
            self.outcome.stall_seconds += self.now - start
            self.scheduler.waited(self.now - start)
        return ready

    def count(self, call: Call) -> None:
        hits = sum(self.scheduler.is_resident((call.layer, expert)) for expert in call.experts)
        self.outcome.hits += hits
        self.outcome.misses += len(call.experts) - hits

    def carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Load():
                    self.outcome.loads += 1
                    self.link.submit(action)
                case Hurry():
                    self.link.hurry(action.key)
                case Cancel():
                    self.link.cancel(action.key)

    def ended(self, transfer: Transfer) -> None:
        """A load has ended, complete or dropped."""
        tell, key = self.scheduler, transfer.load.key
        if transfer.dropped:
            self.carry_out(tell.dropped(key, self.link.now))
        else:
            self.carry_out(tell.arrived(key, transfer.seconds, self.link.now))
