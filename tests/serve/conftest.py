"""Servers on loopback with the trained demo model."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from live_server import Live, serving

import foregate
from foregate.serve.guard import Rules

MODEL = Path(__file__).parents[2] / "demo/mixtral-tiny"


@pytest.fixture(scope="session")
def demo_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foregate.convert(MODEL, tmp_path_factory.mktemp("serve") / "demo")


@pytest.fixture(scope="session")
def live(demo_store: Path) -> Iterator[Live]:
    """A server for all tests that leave it as it was."""
    with serving(demo_store, Rules(), stalled_seconds=30) as running:
        yield running
        assert running.idle_within(10)


@pytest.fixture
def start(demo_store: Path) -> Iterator[Callable[..., Live]]:
    """start(rules=..., stalled_seconds=..., **limits): a server of the test's own."""
    with contextlib.ExitStack() as stack:

        def make(rules: Rules | None = None, stalled_seconds: float = 30, **limits: int) -> Live:
            return stack.enter_context(serving(demo_store, rules or Rules(), stalled_seconds, **limits))

        yield make
