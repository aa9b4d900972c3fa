"""The link: right bytes, demand first, exactly one answer to every load, whatever happens."""

import errno
import itertools
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from links import Gate, Listener, open_descriptors, records_of

from foregate.checkpoint.store import ExpertKey, Store
from foregate.errors import ForegateError
from foregate.memory import disk
from foregate.memory.disk import DiskToHost
from foregate.memory.link import Link
from foregate.memory.slots import SlotMemory
from foregate.schedule import Load

SMALL = 16384  # bytes of a chunk: several a record
MakeLink = Callable[..., tuple[Link, Listener]]


@pytest.fixture
def opened(store: Callable[[str], Path]) -> Store:
    return Store(store("mixtral"))


@pytest.fixture
def memory(opened: Store) -> SlotMemory:
    return SlotMemory(opened.num_experts, opened.record_bytes)


@pytest.fixture
def make_link(opened: Store, memory: SlotMemory) -> Iterator[MakeLink]:
    """make_link(**options): a link with two readers and small chunks, and who listens to it; closed after the test."""
    links = []

    def make(
        store: Store = opened, listener: Listener | None = None, chunk_bytes: int = SMALL, **options: object
    ) -> tuple[Link, Listener]:
        listener, carrier = listener or Listener(), DiskToHost(store, memory, chunk_bytes)
        known = {"slots": memory.slots, "record_bytes": lambda key: store.location(key)[1], "readers": 2}
        links.append(Link(carrier, finished=listener, **(known | options)))
        return links[-1], listener

    yield make
    for link in links:
        link.close()


@pytest.fixture
def gate(make_link: MakeLink, opened: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(opened, SMALL, monkeypatch)
    gate.let_through(1)  # the read that tries out direct reads
    yield gate
    gate.let_through()


@pytest.fixture
def chunks(opened: Store) -> int:
    """Chunks of a record."""
    count = -(-opened.record_bytes // SMALL)
    assert count >= 4, "the tests below need several"
    return count


def start_gated(gate: Gate, make_link: MakeLink, **options: object) -> tuple[Link, Listener]:
    link, listener = make_link(**options)
    gate.begun.clear()
    return link, listener


# -- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"readers": 1}, {"readers": 3, "chunk_bytes": 4096}, {"chunk_bytes": 1 << 20}])
def test_every_record_lands_in_its_slot(
    opened: Store, memory: SlotMemory, make_link: MakeLink, options: dict[str, int]
) -> None:
    link, listener = make_link(**options)
    slots = {key: slot for slot, key in enumerate(reversed(records_of(opened)))}
    for key, slot in slots.items():
        link.submit(Load(key, slot))
    told = listener.wait(len(slots))
    assert link.in_flight == 0 and sorted(listener.keys) == sorted(slots)
    check_records(opened, memory, slots)
    assert not any(finished.error or finished.dropped for finished in told)
    assert link.bytes_moved == sum(finished.nbytes for finished in told) == opened.experts_bytes
    assert link.busy_seconds == pytest.approx(sum(finished.seconds for finished in told))


def test_the_busy_time_leaves_out_the_idle_time(make_link: MakeLink) -> None:
    link, listener = make_link()
    for expert in range(3):
        link.submit(Load((0, expert), 0))
        listener.wait(expert + 1)
        time.sleep(0.05)
    assert 0 < link.busy_seconds < 0.1


def test_what_no_link_can_do(opened: Store, memory: SlotMemory, make_link: MakeLink, gate: Gate) -> None:
    gate.let_through(3)  # reads that try out direct reads
    for options in ({"readers": 0}, {"bandwidth": 0.0}, {"latency": -1.0}):
        with pytest.raises(ValueError, match="no link"):
            make_link(**options)
    for chunk_bytes in (0, 1000):
        with pytest.raises(ValueError, match="direct reads"):
            make_link(chunk_bytes=chunk_bytes)
    link, _ = make_link()
    link.submit(Load((0, 0), 0))
    for load in (Load((0, 0), 1), Load((0, 1), 0), Load((0, 1), memory.slots), Load((0, 1), -1)):
        with pytest.raises(ValueError):
            link.submit(load)
    assert link.in_flight == 1


# -- urgency ----------------------------------------------------------------------------------------------------------


def test_demand_overtakes_after_a_chunk_a_reader_and_the_prefetch_resumes(
    opened: Store, memory: SlotMemory, make_link: MakeLink, gate: Gate, chunks: int
) -> None:
    link, listener = start_gated(gate, make_link)
    link.submit(Load((0, 0), 0, demand=False))
    gate.wait_begun(2)
    link.submit(Load((1, 1), 1))
    link.submit(Load((1, 0), 2))
    gate.let_through_singly(3 * chunks)
    listener.wait(3)
    assert [key for key, _ in gate.begun] == (
        [(0, 0)] * 2 + [(1, 1)] * chunks + [(1, 0)] * chunks + [(0, 0)] * (chunks - 2)
    )
    assert listener.keys == [(1, 1), (1, 0), (0, 0)]
    assert len(set(gate.begun)) == len(gate.begun)  # no chunk is read twice
    check_records(opened, memory, {(0, 0): 0, (1, 1): 1, (1, 0): 2})


def test_hurry_makes_a_prefetch_a_demand_load(make_link: MakeLink, gate: Gate, chunks: int) -> None:
    link, listener = start_gated(gate, make_link, readers=1)
    link.submit(Load((0, 0), 0, demand=False))
    gate.wait_begun(1)
    for slot, key in enumerate([(0, 1), (0, 2)], start=1):
        link.submit(Load(key, slot, demand=False))
    link.submit(Load((1, 0), 3))
    link.hurry((0, 2))
    link.hurry((1, 0))  # is one already
    link.hurry((2, 5))  # unknown
    gate.let_through()
    listener.wait(4)
    link.hurry((0, 0))  # finished
    assert listener.keys == [(1, 0), (0, 2), (0, 1), (0, 0)]
    assert [key for key, _ in gate.begun] == (
        [(0, 0)] + [(1, 0)] * chunks + [(0, 2)] * chunks + [(0, 1)] * chunks + [(0, 0)] * (chunks - 1)
    )


def test_back_goes_over_the_link_before_the_record(
    opened: Store, memory: SlotMemory, make_link: MakeLink, gate: Gate, chunks: int
) -> None:
    link, listener = start_gated(gate, make_link, readers=3)
    link.submit(Load((1, 1), 0, back=(2, 2)))
    gate.wait_begun(3)
    gate.let_through(chunks - 1)  # one of them stays in progress
    gate.wait_begun(chunks)
    time.sleep(0.02)
    assert {key for key, _ in gate.begun} == {(2, 2)}
    gate.let_through()
    assert listener.wait(1)[0].nbytes == 2 * opened.record_bytes == link.bytes_moved
    check_records(opened, memory, {(1, 1): 0})


# -- cancelling -------------------------------------------------------------------------------------------------------


def test_a_queued_load_is_dropped_at_once_by_a_reader(make_link: MakeLink, gate: Gate) -> None:
    link, listener = start_gated(gate, make_link)
    link.submit(Load((0, 0), 0))
    link.submit(Load((0, 1), 1, demand=False))
    gate.wait_begun(2)
    link.cancel((0, 1))
    link.cancel((0, 1))
    assert not listener.told  # not from the caller's stack, and both readers are at work
    gate.let_through()
    told = listener.wait(2)
    assert listener.keys == [(0, 1), (0, 0)]
    assert (told[0].dropped, told[0].nbytes, told[0].seconds) == (True, 0, 0.0)
    assert listener.threads <= {"reader-0", "reader-1"}
    link.cancel((0, 1))
    link.cancel((2, 2))
    assert link.in_flight == 0 and len(listener.told) == 2


def test_a_dropped_load_frees_its_slot_once_nothing_writes_there(
    memory: SlotMemory, make_link: MakeLink, gate: Gate
) -> None:
    link, listener = start_gated(gate, make_link)
    link.submit(Load((0, 0), 0, demand=False))
    gate.wait_begun(2)
    link.cancel((0, 0))
    with pytest.raises(ValueError, match="already"):
        link.submit(Load((0, 1), 0))
    gate.let_through(1)
    time.sleep(0.02)
    assert not listener.told and link.in_flight == 1
    gate.let_through()
    (finished,) = listener.wait(1)
    assert finished.dropped and finished.nbytes == 2 * SMALL and finished.error is None
    memory.record(0, SMALL).fill_(7)
    link.submit(Load((0, 0), 1))
    listener.wait(2)
    assert (memory.record(0, SMALL) == 7).all()


def test_a_dropped_load_has_no_error(make_link: MakeLink, opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    link, listener = make_link(readers=1)
    begun, cancelled = threading.Event(), threading.Event()

    def fail(fd: int, buffers: list[memoryview], offset: int) -> int:
        begun.set()
        assert cancelled.wait(5)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(disk, "RETRY_PAUSES", ())
    monkeypatch.setattr(os, "preadv", fail)
    link.submit(Load((0, 0), 0, demand=False))
    assert begun.wait(5)
    link.cancel((0, 0))
    cancelled.set()
    (finished,) = listener.wait(1)
    assert finished.dropped and finished.error is None and finished.nbytes == link.bytes_moved == 0


# -- the callback -----------------------------------------------------------------------------------------------------


def test_finished_may_call_the_link(opened: Store, memory: SlotMemory, make_link: MakeLink) -> None:
    keys = list(records_of(opened))

    def go_on(finished: object) -> None:
        started = len(listener.told) + 1
        if started < len(keys):
            link.submit(Load(keys[started], started, demand=False))
            link.hurry(keys[started])
            link.cancel(keys[0])  # finished long ago

    link, listener = make_link(listener=Listener(go_on))
    link.submit(Load(keys[0], 0))
    listener.wait(len(keys))
    check_records(opened, memory, {key: slot for slot, key in enumerate(keys)})


def test_loads_are_told_one_at_a_time_in_the_order_in_which_they_ended(make_link: MakeLink, opened: Store) -> None:
    inside: list[object] = []
    crowded: list[object] = []

    def linger(finished: object) -> None:
        inside.append(finished)
        crowded.extend(inside[1:])
        time.sleep(0.002)
        inside.remove(finished)

    link, listener = make_link(listener=Listener(linger), readers=3)
    for slot, key in enumerate(records_of(opened)):
        link.submit(Load(key, slot))
    listener.wait(opened.num_experts)
    assert not crowded


def test_a_failing_callback_is_reported_and_the_link_stays_alive(
    make_link: MakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: reported.append(arguments.exc_value))

    def fail(finished: object) -> None:
        if not reported:
            raise SystemExit("a mistake")

    link, listener = make_link(listener=Listener(fail), readers=1, bandwidth=1e7)
    for expert in range(3):
        link.submit(Load((0, expert), expert))
    listener.wait(2)  # the others
    assert [str(error) for error in reported] == ["a mistake"]
    with pytest.raises(RuntimeError, match="could not be handled") as caught:
        link.submit(Load((1, 0), 0))
    assert caught.value.__cause__ is reported[0]
    link.close()


# -- faults -----------------------------------------------------------------------------------------------------------


def test_a_record_that_cannot_be_read_leaves_the_others_alone(
    opened: Store, memory: SlotMemory, make_link: MakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, listener = make_link()
    first, nbytes = opened.location((1, 3))
    real = os.preadv

    def fail(fd: int, buffers: list[memoryview], offset: int) -> int:
        if first <= offset < first + nbytes:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", fail)
    monkeypatch.setattr(disk, "RETRY_PAUSES", (0.001, 0.002, 0.003))
    slots = {key: slot for slot, key in enumerate(records_of(opened))}
    for key, slot in slots.items():
        link.submit(Load(key, slot))
    errors = {finished.key: finished.error for finished in listener.wait(len(slots)) if finished.error}
    assert list(errors) == [(1, 3)]
    assert opened.record_name((1, 3)) in str(errors[(1, 3)])
    del slots[(1, 3)]
    check_records(opened, memory, slots)
    monkeypatch.setattr(os, "preadv", real)
    link.submit(Load((1, 3), 0))  # the disk has recovered
    assert listener.wait(len(slots) + 2)[-1].error is None
    check_records(opened, memory, {(1, 3): 0})


def test_a_slow_read_holds_up_its_own_record_only(
    opened: Store, memory: SlotMemory, make_link: MakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, listener = make_link()
    slow_down_first_record(opened, monkeypatch)
    for slot, key in enumerate([(0, 0), (0, 1), (0, 2)]):
        link.submit(Load(key, slot))
    told = listener.wait(3)
    assert listener.keys == [(0, 1), (0, 2), (0, 0)]
    assert told[2].seconds > told[1].seconds
    check_records(opened, memory, {(0, 0): 0, (0, 1): 1, (0, 2): 2})


@pytest.mark.parametrize("damaged", [True, False])
def test_a_record_that_changes_under_us(
    opened: Store, memory: SlotMemory, make_link: MakeLink, tmp_path: Path, damaged: bool
) -> None:
    own = Store(shutil.copytree(opened.path, tmp_path / "store"))
    link, listener = make_link(store=own)
    link.submit(Load((0, 0), 0))
    assert listener.wait(1)[0].error is None
    with own.experts_path.open("r+b") as stream:
        stream.seek(own.location((1, 1))[0])
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ damaged]))
    link.submit(Load((1, 1), 1))
    link.submit(Load((1, 2), 2))
    errors = {finished.key: finished.error for finished in listener.wait(3) if finished.error}
    if damaged:
        assert list(errors) == [(1, 1)] and own.record_name((1, 1)) in str(errors[(1, 1)])
    else:
        assert not errors
    check_records(opened, memory, {(1, 2): 2} | ({} if damaged else {(1, 1): 1}))


# -- closing ----------------------------------------------------------------------------------------------------------


def test_close_finishes_what_is_queued_ends_the_threads_and_closes_the_file(
    opened: Store, memory: SlotMemory, make_link: MakeLink
) -> None:
    before = open_descriptors(opened.experts_path)
    link, listener = make_link(bandwidth=1e7)
    for expert in range(8):
        link.submit(Load((0, expert), expert))
    assert open_descriptors(opened.experts_path) == before + 1
    link.close()
    assert len(listener.told) == 8 and not readers_alive()
    assert open_descriptors(opened.experts_path) == before
    link.close()
    with pytest.raises(ForegateError, match="closed"):
        link.submit(Load((0, 0), 0))


def test_close_later_does_not_wait_for_a_disk_that_hangs(opened: Store, make_link: MakeLink, gate: Gate) -> None:
    before = open_descriptors(opened.experts_path)
    link, listener = start_gated(gate, make_link)
    link.submit(Load((0, 0), 0))
    link.submit(Load((0, 1), 1))
    gate.wait_begun(2)
    readers = readers_alive()
    assert len(readers) == 2
    link.close_later()
    link.close()
    with pytest.raises(ForegateError, match="closed"):
        link.submit(Load((0, 2), 2))
    gate.let_through()  # the disk answers at last
    for reader in readers:
        reader.join(5)
    assert not readers_alive() and open_descriptors(opened.experts_path) == before
    assert not listener.told and len(gate.begun) == 2


# -- pacing -----------------------------------------------------------------------------------------------------------


def test_a_paced_link_is_as_fast_as_it_is_set(opened: Store, make_link: MakeLink) -> None:
    """All records in 0.6 s: never faster, and within 3 % unless this machine is too busy to wake a thread in time."""
    bandwidth = opened.experts_bytes / 0.6
    rates = []
    for _ in range(4):
        link, listener = make_link(bandwidth=bandwidth)
        start = time.perf_counter()
        for slot, key in enumerate(records_of(opened)):
            link.submit(Load(key, slot))
        listener.wait(opened.num_experts)
        rates.append(opened.experts_bytes / (time.perf_counter() - start) / bandwidth)
        assert listener.keys == list(records_of(opened))  # one serial link
        if rates[-1] > 0.97:
            break
    assert 0.97 < max(rates) <= 1.0, rates


def test_a_paced_link_is_even_and_saves_up_no_credit(opened: Store, make_link: MakeLink) -> None:
    seconds = 0.03  # a record
    times: list[float] = []
    link, listener = make_link(
        listener=Listener(lambda finished: times.append(time.perf_counter())), bandwidth=opened.record_bytes / seconds
    )
    for round_ in range(2):
        start = time.perf_counter()
        for expert in range(8):
            link.submit(Load((round_, expert), expert))
        listener.wait(8 * (round_ + 1))
        arrivals = times[-8:]
        assert all(t - start >= (n + 1) * seconds - 1e-4 for n, t in enumerate(arrivals))  # no burst
        gaps = sorted(b - a for a, b in itertools.pairwise(arrivals))
        assert seconds * 0.8 < gaps[len(gaps) // 2] < seconds * 1.2
        time.sleep(0.2)


def test_a_paced_link_is_free_for_demand_every_half_millisecond(
    opened: Store, make_link: MakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    carry = DiskToHost.carry
    monkeypatch.setattr(DiskToHost, "carry", lambda self, *piece: sizes.append(piece[-1]) or carry(self, *piece))
    link, listener = make_link(chunk_bytes=1 << 20, bandwidth=20e6)
    link.submit(Load((0, 0), 0))
    listener.wait(1)
    assert sum(sizes) == opened.record_bytes
    assert max(sizes) == 8192  # whole pages of the 10,000 bytes that take so long


def test_a_record_takes_the_latency_longer(make_link: MakeLink) -> None:
    link, listener = make_link(latency=0.02)  # of a link that is otherwise as fast as it can be
    start = time.perf_counter()
    for expert in range(5):
        link.submit(Load((0, expert), expert))
    listener.wait(5)
    assert time.perf_counter() - start >= 5 * 0.02


@pytest.mark.parametrize("pace", [{"bandwidth": 1e9}, {"latency": 1e-4}])
def test_a_paced_link_is_serial_even_when_a_read_is_slow(
    opened: Store, make_link: MakeLink, monkeypatch: pytest.MonkeyPatch, pace: dict[str, float]
) -> None:
    link, listener = make_link(chunk_bytes=1 << 20, **pace)
    slow_down_first_record(opened, monkeypatch)
    for slot, key in enumerate([(0, 0), (0, 1), (0, 2)]):
        link.submit(Load(key, slot))
    listener.wait(3)
    assert listener.keys == [(0, 0), (0, 1), (0, 2)]


# -- helpers ----------------------------------------------------------------------------------------------------------


def check_records(store: Store, memory: SlotMemory, slots: dict[ExpertKey, int]) -> None:
    expected = records_of(store)
    for key, slot in slots.items():
        assert torch.equal(memory.record(slot, len(expected[key])), expected[key])


def slow_down_first_record(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the first read of record (0, 0) take 0.3 s."""
    slow, real = store.location((0, 0))[0], os.preadv

    def read(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset == slow:
            time.sleep(0.3)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)


def readers_alive() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("reader-")]
