"""A simple model of who owns which slot of a link, beside a real link: every answer is compared with what was asked."""

from collections.abc import Callable

import pytest
import torch
from links import Listener, records_of

from foregate.checkpoint.store import ExpertKey, Store
from foregate.memory.link import Finished, Link
from foregate.schedule import Load

MARK = 0xA5  # what the owner writes into a slot that a dropped load gave back


class World:
    """Owns the slots, uint8 [slots, bytes], and hands them to the link that `make_link(listener)` opens onto them."""

    def __init__(self, store: Store, memory: torch.Tensor, make_link: Callable[[Listener], Link]) -> None:
        self.store, self.memory, self.expected = store, memory, records_of(store)
        self.free, self.marked = list(range(len(memory))), set()
        self.in_flight: dict[ExpertKey, Load] = {}
        self.cancelled: set[ExpertKey] = set()
        self.mistakes: list[str] = []
        self.listener = Listener(self.judge)
        self.handled = 0
        self.link = make_link(self.listener)

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

    def record(self, slot: int) -> torch.Tensor:
        return self.memory[slot, : self.store.record_bytes]

    def judge(self, finished: Finished) -> None:
        """In the reader thread, before the slot can be used again."""
        load = self.in_flight[finished.key]
        whole = self.store.record_bytes * (1 if load.back is None else 2)
        if finished.dropped:
            self.record(load.slot).fill_(MARK)
            right = finished.key in self.cancelled and finished.nbytes <= whole
        else:
            right = torch.equal(self.record(load.slot), self.expected[finished.key]) and finished.nbytes == whole
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
            assert (self.record(slot) == MARK).all(), "written to after it was dropped"
            self.marked.remove(slot)

    def finish(self) -> None:
        while self.in_flight:
            self.wait()
        self.link.close()
        for slot in self.free:
            self.check_mark(slot)
        assert not self.mistakes
        assert self.handled == len(self.listener.told)
        assert sorted(self.free) == list(range(len(self.memory))) and self.link.in_flight == 0
        assert self.link.bytes_moved == sum(finished.nbytes for finished in self.listener.told)
        assert self.link.busy_seconds == pytest.approx(sum(finished.seconds for finished in self.listener.told))
