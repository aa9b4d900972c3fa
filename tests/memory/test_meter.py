"""A link's time, on a clock that the tests set."""

import pytest

from foregate.memory.meter import FORGIVEN_SECONDS, Meter, Pacer
from foregate.memory.transfers import Chunk, Transfer, TransferQueue
from foregate.schedule import Load
from foregate.simulate.machine import Machine

BANDWIDTH = 4096 * 10  # a chunk takes 0.1 s


def chunk(submitted_at: float = 0.0) -> Chunk:
    return Chunk(Transfer(Load((0, 0), 0), submitted_at), (0, 0), 0, 4096, share=0.25)


def test_chunks_in_progress_at_once_share_the_time() -> None:
    meter, first, second = Meter(), chunk(), chunk()
    meter.start(first, 10.0)
    meter.start(second, 11.0)
    meter.stop(first, 13.0, 4096)
    meter.stop(second, 14.0, 0)  # failed
    assert (first.transfer.seconds, second.transfer.seconds) == (2.0, 2.0)
    assert (meter.busy_seconds, meter.bytes_moved) == (4.0, 4096)
    meter.start(chunk(), 20.0)  # idle time counts for nobody
    meter.count(21.0)
    assert meter.busy_seconds == 5.0


def test_chunks_that_wait_are_spaced_evenly_whenever_they_are_claimed() -> None:
    pacer = Pacer(BANDWIDTH)
    assert pacer.due(chunk(), 0.0) == pytest.approx(0.1)
    assert pacer.due(chunk(), 0.0) == pytest.approx(0.2)  # claimed by another thread at once
    assert pacer.due(chunk(), 0.1) == pytest.approx(0.3)
    assert pacer.due(chunk(), 0.3 + FORGIVEN_SECONDS / 2) == pytest.approx(0.4)  # a little late: a link has no pauses


def test_idle_time_saves_up_no_credit() -> None:
    pacer = Pacer(BANDWIDTH)
    pacer.due(chunk(), 0.0)
    assert [pacer.due(chunk(5.0), 5.0) for _ in range(3)] == pytest.approx([5.1, 5.2, 5.3])


def test_a_slow_disk_saves_up_no_credit_either() -> None:
    pacer = Pacer(BANDWIDTH)
    pacer.due(chunk(), 0.0)
    dues = [pacer.due(chunk(), 2.1) for _ in range(3)]  # the first took 2 s longer than the link would
    assert dues == pytest.approx([2.2 - FORGIVEN_SECONDS, 2.3 - FORGIVEN_SECONDS, 2.4 - FORGIVEN_SECONDS])


def test_a_load_takes_as_long_as_on_the_simulated_machine() -> None:
    machine = Machine(record_bytes=22528, link_bandwidth=25e9, link_latency=0.07, chunk_bytes=4096)
    queue, pacer, dues = TransferQueue(lambda key: machine.record_bytes, 4096), Pacer(25e9, 0.07), []
    queue.add(Load((0, 0), 0, back=(0, 1)), 0.0)  # two records
    while piece := queue.claim():
        dues.append(pacer.due(piece, 0.0))
        queue.complete(piece, None)
    assert dues[0] == pytest.approx(machine.chunk_seconds)
    assert dues[-1] == pytest.approx(2 * machine.load_seconds)


def test_without_a_bandwidth_nothing_waits() -> None:
    pacer = Pacer(None)
    assert all(pacer.due(chunk(), now) <= now for now in (1.0, 1.0, 3.0))
