"""The link under random operations, beside a simple model of who owns which slot."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from link_world import World

from foregate.checkpoint.store import Store
from foregate.memory.disk import DiskToHost
from foregate.memory.link import Link
from foregate.memory.slots import SlotMemory

SLOTS = 5

KEYS = st.tuples(st.integers(0, 2), st.integers(0, 3))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), KEYS, st.booleans(), st.none() | KEYS),
        st.tuples(st.sampled_from(["cancel", "hurry"]), KEYS),
        st.tuples(st.just("wait")),
    ),
    max_size=40,
)


@pytest.fixture(scope="module")
def opened(store: Callable[[str], Path]) -> Store:
    return Store(store("mixtral"))


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, readers=st.integers(1, 3), bandwidth=st.none() | st.just(1e8))
def test_every_load_is_answered_once_and_rightly(
    opened: Store, steps: list[tuple], readers: int, bandwidth: float | None
) -> None:
    memory = SlotMemory(SLOTS, opened.record_bytes)
    world = World(
        opened,
        memory.tensor,
        lambda listener: Link(
            DiskToHost(opened, memory, chunk_bytes=8192),
            slots=SLOTS,
            record_bytes=lambda key: opened.location(key)[1],
            readers=readers,
            finished=listener,
            bandwidth=bandwidth,
        ),
    )
    try:
        for name, *arguments in steps:
            getattr(world, name)(*arguments)
        world.finish()
    finally:
        world.link.close()
