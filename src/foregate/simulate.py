"""A machine under a virtual clock: the same scheduler objects as the engine's, a link and a processor made of numbers.

`run` is the engine's step with time added up instead of spent. The link serves one record at a time, demand loads
first; a demand load that comes while a prefetch is at work waits for the end of the chunk.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from foregate.schedule import Action, Call, Cancel, ExpertKey, Hurry, Load, Prediction, Scheduler


@dataclass(frozen=True)
class Machine:
    """Durations in seconds, sizes in bytes."""

    record_bytes: int
    link_bandwidth: float  # bytes/s
    link_latency: float = 0.0  # fixed cost of a record
    chunk_bytes: int = 1 << 20
    layer_seconds: float = 0.0  # attention, router and all that is not experts, one layer and token
    expert_seconds: float = 0.0  # one expert on one token
    call_seconds: float = 0.0  # fixed cost of one kernel call, whatever its experts
    token_seconds: float = 0.0  # embedding, head, sampling
    gate_seconds: float = 0.0  # one prediction

    @property
    def load_seconds(self) -> float:
        """One record over an idle link."""
        return self.link_latency + self.record_bytes / self.link_bandwidth

    @property
    def chunk_seconds(self) -> float:
        return self.load_seconds * min(1.0, self.chunk_bytes / self.record_bytes)


@dataclass
class Outcome:
    """What a simulated run took and did."""

    tokens: int = 0
    seconds: float = 0.0
    hits: int = 0
    misses: int = 0  # not resident when routed, prefetches under way among them
    late: int = 0  # of the misses: under way
    loads: int = 0
    prefetches: int = 0
    useful: int = 0  # prefetches that were used before they left
    stall_seconds: float = 0.0
    link_seconds: float = 0.0
    compute_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class _Transfer:
    load: Load
    left: float  # seconds of link time
    total: float
    demand: bool
    worked: float = 0.0


@dataclass
class _Link:
    """A preemptive server. `committed`: the transfer whose chunk is at work, and seconds until that chunk is done."""

    machine: Machine
    queue: list[_Transfer] = field(default_factory=list)
    cancelled: list[ExpertKey] = field(default_factory=list)
    clock: float = 0.0
    busy: float = 0.0
    chunk_of: _Transfer | None = None

    def submit(self, load: Load) -> None:
        seconds = self.machine.load_seconds * (2 if load.back else 1)
        self.queue.append(_Transfer(load, seconds, seconds, load.demand))

    def next_at_work(self) -> _Transfer | None:
        return min(self.queue, key=lambda transfer: not transfer.demand, default=None)


class _Run:
    def __init__(self, scheduler: Scheduler, machine: Machine) -> None:
        self.scheduler, self.machine = scheduler, machine
        self.link, self.now, self.outcome = _Link(machine), 0.0, Outcome()
        self.fetched: set[ExpertKey] = set()  # by a prefetch, and not used yet

    def carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Load):
                self.outcome.loads += 1
                if action.demand:
                    self.fetched.discard(action.key)
                else:
                    self.outcome.prefetches += 1
                    self.fetched.add(action.key)
                self.start_chunk()
                self.link.submit(action)
            elif isinstance(action, Hurry):
                self.start_chunk()
                self.transfer(action.key).demand = True
            elif isinstance(action, Cancel):
                self.link.cancelled.append(action.key)

    def transfer(self, key: ExpertKey) -> _Transfer:
        return next(transfer for transfer in self.link.queue if transfer.load.key == key)

    def start_chunk(self) -> None:
        """What the link is working on cannot be interrupted before its chunk is done."""
        link = self.link
        if link.chunk_of is None:
            at_work = link.next_at_work()
            link.chunk_of = at_work if at_work is not None and at_work.worked > 0 else None

    def advance(self, until: float) -> None:
        """Let the link work until `until`, telling the scheduler of every end at its time."""
        link, chunk = self.link, self.machine.chunk_seconds
        while True:
            self.drop_cancelled()
            at_work = link.chunk_of if link.chunk_of in link.queue else link.next_at_work()
            if at_work is None:
                link.clock = max(link.clock, until)
                return
            if link.clock >= until:
                return
            span = at_work.left
            if link.chunk_of is at_work:
                into = at_work.worked % chunk
                span = min(span, chunk - into)
            span_end = min(span, until - link.clock)
            link.clock += span_end
            link.busy += span_end
            at_work.left -= span_end
            at_work.worked += span_end
            if span_end == span:
                link.chunk_of = None
            if at_work.left <= 1e-12:
                link.queue.remove(at_work)
                self.carry_out(self.scheduler.arrived(at_work.load.key, at_work.total, link.clock))

    def drop_cancelled(self) -> None:
        while self.link.cancelled:
            key = self.link.cancelled.pop()
            transfer = next((t for t in self.link.queue if t.load.key == key), None)
            if transfer is not None:
                self.link.queue.remove(transfer)
                self.fetched.discard(key)
                self.carry_out(self.scheduler.dropped(key, self.link.clock))

    def spend(self, seconds: float) -> None:
        """The processor works."""
        self.now += seconds
        self.outcome.compute_seconds += seconds
        self.advance(self.now)

    def await_link(self) -> None:
        """Nothing can be computed: wait for the next end of a load."""
        before, ends = self.now, self.scheduler.in_flight()
        if not ends:
            raise RuntimeError("deadlock: nothing is resident and nothing on its way")
        while self.scheduler.in_flight() == ends or not self.link.clock > self.now:
            at_work = self.link.chunk_of if self.link.chunk_of in self.link.queue else self.link.next_at_work()
            if at_work is None:
                break
            self.advance(self.link.clock + at_work.left)
            if self.scheduler.in_flight() != ends:
                break
        self.now = max(self.now, self.link.clock)
        self.outcome.stall_seconds += self.now - before
        self.scheduler.waited(self.now - before)

    def call(self, call: Call) -> None:
        machine, scheduler, layer = self.machine, self.scheduler, call.layer
        if layer == 0:
            self.spend(machine.token_seconds)
        self.predict(call.before)
        self.spend(machine.layer_seconds)
        self.count(call)
        self.carry_out(scheduler.routed(layer, call.experts, self.now, call.tokens))
        self.advance(self.now)
        self.predict(call.after)
        waiting = list(call.experts)
        while waiting:
            ready = [expert for expert in waiting if scheduler.is_resident((layer, expert))]
            if not ready:
                self.await_link()
                continue
            waiting = [expert for expert in waiting if expert not in ready]
            self.spend(machine.call_seconds + machine.expert_seconds * len(ready))
            for expert in ready:
                self.carry_out(scheduler.computed((layer, expert), self.now))

    def predict(self, prediction: Prediction | None) -> None:
        if prediction is not None and self.scheduler.wants_predictions():
            self.spend(self.machine.gate_seconds)
            known = replace(prediction, seconds=self.machine.gate_seconds)
            self.carry_out(self.scheduler.predicted(known, self.now))

    def count(self, call: Call) -> None:
        outcome = self.outcome
        for expert in call.experts:
            key = call.layer, expert
            if self.scheduler.is_resident(key):
                outcome.hits += 1
            else:
                outcome.misses += 1
                outcome.late += key in self.scheduler.in_flight()
            if key in self.fetched:
                outcome.useful += 1
                self.fetched.discard(key)


def run(calls: Iterable[Call], scheduler: Scheduler, machine: Machine, warm_up: int = 0) -> Outcome:
    """Simulate the calls. Tokens are counted at layer 0; the first `warm_up` of them are run and not counted."""
    simulation, tokens = _Run(scheduler, machine), 0
    start = 0.0
    for call in calls:
        if call.layer == 0:
            if tokens == warm_up:
                start, simulation.outcome = simulation.now, Outcome()
                busy = simulation.link.busy
            tokens += 1
        simulation.call(call)
    outcome = simulation.outcome
    outcome.tokens, outcome.seconds = tokens - warm_up, simulation.now - start
    outcome.link_seconds = simulation.link.busy - busy
    return outcome
