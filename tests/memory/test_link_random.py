"""The link under random operations, beside a simple model of who owns which slot."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from links import Listener, records_of

from foregate.checkpoint.store import ExpertKey, Store
from foregate.memory.disk import DiskToHost
from foregate.memory.link import Finished, Link
from foregate.memory.slots import SlotMemory
from foregate.schedule import Load

SLOTS = 5
MARK = 0xA5  # what the owner writes into a slot that a dropped load gave back

KEYS = st.tuples(st.integers(0, 2), st.integers(0, 3))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), KEYS, st.booleans(), st.none() | KEYS),
        st.tuples(st.sampled_from(["cancel", "hurry"]), KEYS),
        st.tuples(st.just("wait")),
    ),
    max_size=40,
)


class World:
    """Owns the slots and hands them to the link; every answer is compared with what was asked."""

    def __init__(self, store: Store, readers: int, bandwidth: float | None) -> None:
        self.store, self.expected = store, records_of(store)
        self.memory = SlotMemory(SLOTS, store.record_bytes)
        self.free, self.marked = list(range(SLOTS)), set()
        self.in_flight: dict[ExpertKey, Load] = {}
        self.cancelled: set[ExpertKey] = set()
        self.mistakes: list[str] = []
        self.listener = Listener(self.judge)
        self.handled = 0
        self.link = Link(
            DiskToHost(store, self.memory, chunk_bytes=8192),
            slots=SLOTS,
            record_bytes=lambda key: store.location(key)[1],
            readers=readers,
            finished=self.listener,
            bandwidth=bandwidth,
        )

    def submit(self, key: ExpertKey, demand: bool, back: ExpertKey | None) -> None:
        if key in self.in_flight:
            return
        while not self.free:
            self.wait()
        slot = self.free.pop(0)
        self.check_mark(slot)
        self.in_flight[key] = Load(key, slot, demand, back)
        self.link.submit(self.in_flight[key])

    def cancel(self, key: ExpertKey) -> None:
        self.cancelled |= {key} & self.in_flight.keys()
        self.link.cancel(key)

    def hurry(self, key: ExpertKey) -> None:
        self.link.hurry(key)

    def judge(self, finished: Finished) -> None:
        """In the reader thread, before the slot can be used again."""
        load = self.in_flight[finished.key]
        record = self.memory.record(load.slot, self.store.record_bytes)
        whole = self.store.record_bytes * (1 if load.back is None else 2)
        if finished.dropped:
            record.fill_(MARK)
            right = finished.key in self.cancelled and finished.nbytes <= whole
        else:
            right = torch.equal(record, self.expected[finished.key]) and finished.nbytes == whole
        if not right or finished.error:
            self.mistakes.append(f"{load}: {finished}")

    def wait(self) -> None:
        """Take the answers that have come, at least one if any load is in flight."""
        if self.in_flight:
            for finished in self.listener.wait(self.handled + 1)[self.handled :]:
                self.handled += 1
                load = self.in_flight.pop(finished.key)  # KeyError: told twice
                self.cancelled.discard(finished.key)
                self.free.append(load.slot)
                if finished.dropped:
                    self.marked.add(load.slot)

    def check_mark(self, slot: int) -> None:
        if slot in self.marked:
            assert (self.memory.record(slot, self.store.record_bytes) == MARK).all(), "written to after it was dropped"
            self.marked.remove(slot)

    def finish(self) -> None:
        while self.in_flight:
            self.wait()
        self.link.close()
        for slot in self.free:
            self.check_mark(slot)
        assert not self.mistakes
        assert self.handled == len(self.listener.told)
        assert sorted(self.free) == list(range(SLOTS)) and self.link.in_flight == 0
        assert self.link.bytes_moved == sum(finished.nbytes for finished in self.listener.told)
        assert self.link.busy_seconds == pytest.approx(sum(finished.seconds for finished in self.listener.told))


@pytest.fixture(scope="module")
def opened(store: Callable[[str], Path]) -> Store:
    return Store(store("mixtral"))


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, readers=st.integers(1, 3), bandwidth=st.none() | st.just(1e8))
def test_every_load_is_answered_once_and_rightly(
    opened: Store, steps: list[tuple], readers: int, bandwidth: float | None
) -> None:
    world = World(opened, readers, bandwidth)
    try:
        for name, *arguments in steps:
            getattr(world, name)(*arguments)
        world.finish()
    finally:
        world.link.close()
