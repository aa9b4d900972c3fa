"""The scheduler's contract: a state machine that decides which expert lies in which slot. Events in, actions out.

Nothing here knows of torch, threads, clocks or files: time comes with the events, in seconds. The engine feeds it what
happens and carries out what it answers; the simulator does the same under a virtual clock.

    routed(layer, experts)  the router chose these experts; every one of them must be served
    predicted(prediction)   what the gates expect, after `routed` of the layer they read
    arrived(key)            a load has finished: the record is resident
    dropped(key)            a cancelled load has ended: its slot is free
    computed(keys)          the engine has used these records for this layer and may lose them
    waited(seconds)         compute stood still for a load

Each answers with actions in the order to carry them out. Rules that hold at all times (`check_integrity`): a record
is in at most one slot and a slot holds at most one record; a record that the layer at work still needs is never
evicted; every routed expert is served in the end, and once, whatever the number of slots (one is enough): from a slot,
or by the host where a `Placement` decides so; no prefetch starts while a demand load waits for a slot.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from foregate.schedule.placement import Placement

ExpertKey = tuple[int, int]  # (MoE layer, expert)
GATES, NEXT_ROUTER = "gates", "next router"  # what can predict for a policy

REMEMBERED = 32  # experts computed on the host at most, to be loaded when the link is idle


class Load(NamedTuple):
    """Fill `slot` with the record `key`; answered by `arrived(key)`, or `dropped(key)` after a cancellation.

    A demand load goes before all prefetches, a later prefetch before an earlier one. `back`: a record that has to cross
    the link the other way first.
    """

    key: ExpertKey
    slot: int
    demand: bool = True
    back: ExpertKey | None = None


@dataclass(frozen=True)
class Hurry:
    """The prefetch of `key`, under way, has become a demand load."""

    key: ExpertKey


@dataclass(frozen=True)
class Cancel:
    """Give up the prefetch of `key`; answered by `dropped(key)`, or by `arrived(key)` when it was too late."""

    key: ExpertKey


@dataclass(frozen=True)
class Compute:
    """Compute the expert `key` of the layer just routed on the host, from host memory.

    It needs no slot and is not answered. A prefetch of it that is under way goes on, for later.
    """

    key: ExpertKey


Action = Load | Hurry | Cancel | Compute


@dataclass(frozen=True)
class Shape:
    """The MoE layers of a model."""

    experts: tuple[int, ...]  # of each layer
    top_k: tuple[int, ...]  # experts a token uses in each layer

    @property
    def layers(self) -> int:
        return len(self.experts)


@dataclass(frozen=True)
class Prediction:
    """What is expected after the call of one MoE layer. Probabilities as float arrays [experts] of the layer meant."""

    layer: int  # whose router was read
    ahead: tuple[tuple[int, Any], ...]  # (layer, probability that its next call chooses each expert), nearest first
    reuse: Any = None  # [windows, experts]: used within the next 1, 4, 16 tokens, in `layer` itself
    token: bool = False  # whether the embedding of the sampled token was read instead, before the first layer
    seconds: float = 0.0  # that predicting took
    guess: Any = None  # [experts] of the next layer, by its own router: for schedulers that doubt the gates


@dataclass(frozen=True)
class Call:
    """One call of a MoE layer and what was known around it: what a run records and the simulator repeats."""

    layer: int
    experts: tuple[int, ...]  # distinct, in the order in which they were asked for
    tokens: int = 1
    before: Prediction | None = None  # from the sampled token, before the first layer
    after: Prediction | None = None  # by the gate that reads the layer's router input


@dataclass
class Prefetches:
    """What became of prefetches, in records."""

    started: int = 0
    in_time: int = 0  # resident when they were routed
    late: int = 0  # under way when they were routed: a part of the wait was saved
    wasted: int = 0  # cancelled or evicted before any use


class Scheduler(ABC):
    """Slots, residency, demand loads and prefetches; a policy says what to evict and what to fetch ahead.

    A policy implements `victim` and, to fetch ahead, `next_prefetch`; it is told of every use by `used` and of every
    loss by `evicted`.
    """

    one_pool = True  # every slot serves every layer
    told_by: ClassVar[str | None] = None  # what predicts for it: GATES, NEXT_ROUTER or nothing

    def __init__(self, slots: int, shape: Shape) -> None:
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        self.slots, self.shape = slots, shape
        self._slot_of: dict[ExpertKey, int] = {}  # resident, loading and cancelled records
        self._free = list(range(self.slots - 1, -1, -1))
        self._loading: dict[ExpertKey, bool] = {}  # in flight -> whether for demand
        self._dropping: set[ExpertKey] = set()  # in flight and cancelled
        self._needed: set[ExpertKey] = set()  # routed and not yet computed: never evicted
        self._queue: deque[ExpertKey] = deque()  # routed, waiting for a slot
        self._unused: set[ExpertKey] = set()  # fetched ahead and not routed since
        # Prefetches under way -> when they began, put off by what the link has since done for others.
        self._began: dict[ExpertKey, float] = {}
        self._computed_on_host: deque[ExpertKey] = deque(maxlen=REMEMBERED)  # the latest last
        self.prefetches = Prefetches()
        self.placement: Placement | None = None  # None: every expert is computed on the device

    # -- events ---------------------------------------------------------------------------------------------------

    def routed(self, layer: int, experts: Iterable[int], now: float = 0.0, tokens: int = 1) -> list[Action]:
        """The router of `layer` chose `experts` (distinct) for so many tokens.

        Raises RuntimeError if the last layer is not done yet.
        """
        if self._needed:
            raise RuntimeError(f"{len(self._needed)} experts of an earlier layer were not computed")
        keys = [(layer, expert) for expert in experts]
        on_host = self._place(keys, tokens, now)
        if on_host:
            self._computed_on_host += on_host
            keys = [key for key in keys if key not in on_host]
        self._needed.update(keys)
        actions: list[Action] = [Compute(key) for key in on_host]
        slot_of, loading, dropping, unused = self._slot_of, self._loading, self._dropping, self._unused
        for key in keys:
            if key not in slot_of or key in dropping:
                self._queue.append(key)
                continue
            hurry = key in loading and not loading[key]
            if hurry:
                loading[key] = True
                actions.append(Hurry(key))
            if key in unused:
                self._count_use(key, late=hurry)
            self.used(key)
        return actions + self._go_on(now)

    def predicted(self, prediction: Prediction, now: float = 0.0) -> list[Action]:
        """What the gates expect after the layer that was just routed. A policy without use for it ignores it."""
        return []

    def arrived(self, key: ExpertKey, seconds: float = 0.0, now: float = 0.0) -> list[Action]:
        """The load of `key` has finished; the link worked `seconds` on it."""
        if self.placement is not None:
            self.placement.loaded(seconds)
        del self._loading[key]
        if self._began:
            self._put_off(key, seconds)
        if key in self._dropping:  # the cancellation came too late
            self._dropping.remove(key)
            if key in self._queue:
                self._queue.remove(key)
                self._count_use(key, late=True)
                self.used(key)
        return self._go_on(now)

    def dropped(self, key: ExpertKey, now: float = 0.0) -> list[Action]:
        """The cancelled load of `key` has ended."""
        del self._loading[key]
        self._began.pop(key, None)
        self._dropping.remove(key)
        self._release(key)
        return self._go_on(now)

    def computed(self, keys: Collection[ExpertKey], now: float = 0.0) -> list[Action]:
        """The engine no longer reads the slots of `keys` for the layer at work."""
        self._needed.difference_update(keys)
        return self._go_on(now)

    def waited(self, seconds: float) -> None:  # noqa: B027 - a policy may ignore it
        """Compute stood still for a load."""

    # -- questions ------------------------------------------------------------------------------------------------

    def is_complete(self, layer: int) -> bool:
        """Whether all experts of a layer are resident and nothing is in flight that could change that."""
        if self._loading:
            return False
        everything = len(self._slot_of) == sum(self.shape.experts)
        return everything or all((layer, expert) in self._slot_of for expert in range(self.shape.experts[layer]))

    def is_resident(self, key: ExpertKey) -> bool:
        """Whether the record lies complete in a slot."""
        return key in self._slot_of and key not in self._loading

    def slot(self, key: ExpertKey) -> int:
        """The slot of a resident or loading record."""
        return self._slot_of[key]

    def in_flight(self) -> tuple[ExpertKey, ...]:
        """Records on their way."""
        return tuple(self._loading)

    def expected(self) -> tuple[ExpertKey, ...]:
        """Records that the latest predictions say will be used next."""
        return ()

    def wants_predictions(self) -> bool:
        """Whether `predicted` would be listened to now."""
        return False

    def wants_guess(self) -> bool:
        """Whether a prediction after the call just routed should bring a `guess` along."""
        return False

    def facts(self) -> dict[str, Any]:
        """What the policy has to say in a report, as JSON takes it."""
        return {}

    def check_integrity(self) -> None:
        """Raise AssertionError if a rule of the contract is broken."""
        held = list(self._slot_of.values())
        assert len(held) == len(set(held)), "two records share a slot"
        assert sorted(held + self._free) == list(range(self.slots)), "a slot is lost or counted twice"
        assert self._loading.keys() <= self._slot_of.keys(), "a record is loading without a slot"
        assert self._dropping <= self._loading.keys(), "a record is cancelled that is not loading"
        assert all(key not in self._slot_of or key in self._dropping for key in self._queue), "queued, with a slot"
        assert len(self._queue) == len(set(self._queue)), "a record is queued twice"
        assert self._needed <= self._slot_of.keys() | set(self._queue), "a routed expert is forgotten"
        assert not self._dropping & (self._needed - set(self._queue)), "a needed load was cancelled and not queued"
        waiting = set(self._queue) - self._dropping
        assert not waiting or not self._free or not self.one_pool, "a demand load waits beside a free slot"

    # -- what a policy decides ------------------------------------------------------------------------------------

    @abstractmethod
    def victim(self) -> ExpertKey | None:
        """The record to evict next, one for which `evictable` holds, or None to keep all for now."""

    def may_prefetch(self) -> bool:
        """Whether a prefetch may be chosen now: when the link is idle, with all that is known by then."""
        return not self._loading

    def next_prefetch(self, now: float) -> ExpertKey | None:
        """The record to fetch ahead next, or None. `prefetch_slot` finds a slot. It overtakes prefetches under way."""
        return None

    def load_for_later(self) -> ExpertKey | None:
        """The latest record that was computed on the host and is still absent, once: what missed may miss again."""
        while self._computed_on_host:
            if (key := self._computed_on_host.pop()) not in self._slot_of:
                return key
        return None

    def prefetch_slot(self, key: ExpertKey) -> int | None:
        """A slot for the prefetch of `key`, made free if it must be, or None if that is not worth it."""
        return self._free.pop() if self._free else None

    def used(self, key: ExpertKey) -> None:  # noqa: B027 - a policy may ignore it
        """`key` was routed and has, or just got, a slot."""

    def evicted(self, key: ExpertKey) -> None:  # noqa: B027 - a policy may ignore it
        """`key` has lost its slot."""

    def worth_loading(self, keys: list[ExpertKey]) -> list[ExpertKey]:
        """Misses of one layer, those first that are best in a slot afterwards: where they are placed depends on it."""
        return keys

    def evictable(self, key: ExpertKey) -> bool:
        """Whether a resident record may be evicted: the layer at work does not need it."""
        return key not in self._needed and key not in self._loading

    # -- the mechanics --------------------------------------------------------------------------------------------

    def _go_on(self, now: float) -> list[Action]:
        """Serve the demand queue; prefetch only when nothing waits in it."""
        actions = self._serve_queue() if self._queue else []
        if self._queue or not self.may_prefetch():
            return actions
        key = self.next_prefetch(now)
        slot = None if key is None else self.prefetch_slot(key)
        if slot is None:
            return actions
        self._slot_of[key], self._loading[key] = slot, False
        self._unused.add(key)
        self._began[key] = now
        self.prefetches.started += 1
        return [*actions, Load(key, slot, demand=False)]

    def _place(self, keys: list[ExpertKey], tokens: int, now: float) -> list[ExpertKey]:
        """Those of the routed experts that the host is to compute."""
        if self.placement is None or not (missed := [key for key in keys if not self.is_resident(key)]):
            return []
        load = self.placement.load_seconds
        left = {key: load for key in self.worth_loading(missed)}
        for key in left.keys() & (self._loading.keys() - self._dropping):
            left[key] = self.load_left(key, load, now)
        return self.placement.split(left, tokens * self.shape.top_k[keys[0][0]] / len(keys))

    def _serve_queue(self) -> list[Action]:
        actions: list[Action] = []
        while self._queue:
            key = self._queue[0]
            if self._dropping:
                key = next((key for key in self._queue if key not in self._dropping), None)
            if key is None:  # each waits for the end of its own cancelled prefetch
                break
            slot = self.demand_slot(key)
            if slot is None:
                return actions + self._make_room()
            self._queue.remove(key)
            self._slot_of[key], self._loading[key] = slot, True
            self.used(key)
            actions.append(self.demand_load(key, slot))
        return actions

    def demand_slot(self, key: ExpertKey) -> int | None:
        """A free slot for the demand load of `key`, made free if need be, or None if all are in use."""
        if not self._free and (victim := self.victim()) is not None:
            self._evict(victim)
        return self._free.pop() if self._free else None

    def demand_load(self, key: ExpertKey, slot: int) -> Load:
        """The action that fetches `key`."""
        return Load(key, slot)

    def load_left(self, key: ExpertKey, load_seconds: float, now: float) -> float:
        """Seconds that the link will about work on a prefetch under way. It stands still while a later one is under way."""
        began = self._began[key]
        until = min((later for later in self._began.values() if later > began), default=now)
        return min(max(load_seconds - (until - began), 0.0), load_seconds)

    def _put_off(self, key: ExpertKey, seconds: float) -> None:
        """The load of `key` went before the prefetches that began earlier."""
        for earlier in self._began:
            if earlier == key:
                break
            self._began[earlier] += seconds
        self._began.pop(key, None)

    def cancel(self, keys: Sequence[ExpertKey]) -> list[Action]:
        """Give up these prefetches."""
        self._dropping.update(keys)
        return [Cancel(key) for key in keys]

    def _make_room(self) -> list[Action]:
        """Cancel as many prefetches as demand loads wait, the least urgent first."""
        missing = len(self._queue) - len(self._dropping)
        prefetches = [key for key, demand in self._loading.items() if not demand and key not in self._dropping]
        return self.cancel(prefetches[: max(missing, 0)])

    def _evict(self, key: ExpertKey) -> None:
        if not self.evictable(key):
            raise RuntimeError(f"the policy evicts {key}, which is in use")
        self._release(key)

    def _release(self, key: ExpertKey) -> None:
        self._free.append(self._slot_of.pop(key))
        if key in self._unused:
            self._unused.remove(key)
            self.prefetches.wasted += 1
        self.evicted(key)

    def _count_use(self, key: ExpertKey, late: bool) -> None:
        self._unused.remove(key)
        self.prefetches.late += late
        self.prefetches.in_time += not late
