"""Disk, host memory and a device under 10,000 random steps with the least memory there can be: right bytes, no deadlock."""

import random
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from link_world import World

from foregate.checkpoint.store import ExpertKey, Store
from foregate.memory.host import HostRecords
from foregate.memory.link import Link
from foregate.memory.simulated import SimulatedDevice
from foregate.memory.upload import HostToDevice

STEPS = 10_000
RUNS = [(slots, readers) for slots in range(1, 8) for readers in (1, 2, 3)]


class TiersWorld(World):
    """A link from host memory with one place a reader, whose records are also held at random and compared."""

    def __init__(self, store: Store, slots: int, readers: int, choice: random.Random) -> None:
        device = SimulatedDevice(None, 0.0, 1 << 30)
        memory = device.slots(slots, store.record_bytes)
        self.records = HostRecords(store, device, readers * store.record_bytes, readers=readers)
        self.carrier = HostToDevice(self.records, device, memory, chunk_bytes=16384)
        self.choice = choice
        super().__init__(
            store,
            memory,
            lambda listener: Link(
                self.carrier,
                slots=slots,
                record_bytes=self.records.record_bytes,
                readers=readers,
                finished=listener,
            ),
        )

    def step(self) -> None:
        """One random step. Every record of the store, so that most are on disk only."""
        key, keys = self.any_key(), list(self.in_flight) or [self.any_key()]
        match self.choice.choices(["submit", "cancel", "hurry", "wait", "hold"], [5, 2, 2, 1, 2])[0]:
            case "submit":
                self.submit(key, self.choice.random() < 0.5, self.choice.choice([None, None, None, self.any_key()]))
            case "cancel":
                self.cancel(self.choice.choice(keys))
            case "hurry":
                self.hurry(self.choice.choice(keys))
            case "wait":
                self.wait()
            case "hold":
                self.hold()

    def hold(self) -> None:
        """As the CPU does with a layer's experts: several at a time, and none of them may change meanwhile."""
        with ExitStack() as holds:
            keys = [key for key in self.expected if key in self.records or self.choice.random() < 0.1]
            for key, record in [(key, holds.enter_context(self.records.hold(key))) for key in keys]:
                assert record is None or torch.equal(record, self.expected[key])

    def walk(self) -> None:
        """Every record once in turn: each is in host memory when it has come."""
        while self.in_flight:
            self.wait()
        for key, expected in self.expected.items():
            self.submit(key, True, None)
            self.wait()
            with self.records.hold(key) as record:
                assert torch.equal(record, expected)

    def any_key(self) -> ExpertKey:
        return self.choice.randrange(3), self.choice.randrange(8)


@pytest.mark.parametrize(("slots", "readers"), RUNS)
def test_random_steps(store: Callable[[str], Path], slots: int, readers: int) -> None:
    world = TiersWorld(Store(store("mixtral")), slots, readers, random.Random(slots * 10 + readers))
    try:
        for _ in range(STEPS // len(RUNS) + 1):
            world.step()
        world.walk()
        world.finish()
    finally:
        world.link.close()
        world.records.close()
    assert any(finished.dropped for finished in world.listener.told)
