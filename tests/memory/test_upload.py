"""From host memory into a device's slots, over the link: right bytes, one chunk's wait, errors that name the record."""

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from devices import DEVICES, GatedDevice, WatchedDevice, open_device
from links import Gate, Listener, Turnstile, records_of

from foregate.checkpoint.store import ExpertKey, Store
from foregate.errors import ForegateError
from foregate.memory import disk
from foregate.memory.device import Device
from foregate.memory.host import HostRecords
from foregate.memory.link import Link
from foregate.memory.simulated import SimulatedDevice
from foregate.memory.upload import COPY_BYTES, HostToDevice
from foregate.schedule import Load

SMALL = 16384  # bytes of a chunk: several a record


class Tiers:
    """Disk, host memory and a device's slots, one for each record, with a link between the last two."""

    def __init__(self, store: Store, device: Device, places: int | None, readers: int, fill: bool = True) -> None:
        limit = None if places is None else places * store.record_bytes
        self.records = HostRecords(store, device, limit, readers=readers)
        if fill:
            self.records.fill()
        self.slots = device.slots(store.num_experts, store.record_bytes)
        self.carrier = HostToDevice(self.records, device, self.slots, SMALL)
        self.listener = Listener()
        self.link = Link(
            self.carrier,
            slots=len(self.slots),
            record_bytes=self.records.record_bytes,
            readers=readers,
            finished=self.listener,
        )

    def load(self, *keys: ExpertKey, demand: bool = True) -> None:
        """Each into the slot of its number."""
        for layer, expert in keys:
            self.link.submit(Load((layer, expert), 8 * layer + expert, demand))

    def slot(self, key: ExpertKey) -> torch.Tensor:
        return self.slots[8 * key[0] + key[1]].cpu()

    def close(self) -> None:
        self.link.close()
        self.records.close()


MakeTiers = Callable[..., Tiers]


@pytest.fixture
def opened(store: Callable[[str], Path], tmp_path: Path) -> Store:
    """A copy of the store that a test may change."""
    return Store(shutil.copytree(store("mixtral"), tmp_path / "store"))


@pytest.fixture
def expected(opened: Store) -> dict[ExpertKey, torch.Tensor]:
    return {key: record.clone() for key, record in records_of(opened).items()}


@pytest.fixture
def make(opened: Store) -> Iterator[MakeTiers]:
    """make(device, places, readers): tiers that are closed after the test."""
    made = []

    def make(device: Device, places: int | None = None, readers: int = 1, fill: bool = True) -> Tiers:
        made.append(Tiers(opened, device, places, readers, fill))
        return made[-1]

    yield make
    for tiers in made:
        tiers.close()


@pytest.fixture
def gated() -> Iterator[GatedDevice]:
    device = GatedDevice()
    yield device
    device.gate.let_through()


# -- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize(("places", "readers"), [(None, 2), (2, 2), (1, 1), (10, 3)])
def test_every_record_lands_in_its_slot(
    make: MakeTiers, expected: dict[ExpertKey, torch.Tensor], name: str, places: int | None, readers: int
) -> None:
    tiers = make(open_device(name), places, readers)
    for _ in range(2):
        tiers.slots.zero_()
        tiers.load(*expected)
        tiers.listener.wait(len(expected))
        assert all(torch.equal(tiers.slot(key), record) for key, record in expected.items())
        tiers.listener.told.clear()
    assert tiers.link.bytes_moved == 2 * sum(len(record) for record in expected.values())


def test_chunks_are_as_large_as_what_is_slowest_on_the_way_wants(opened: Store) -> None:
    device = WatchedDevice()
    slots = device.slots(1, opened.record_bytes)
    for places, chunk_bytes in ((None, COPY_BYTES), (2, disk.CHUNK_BYTES)):
        limit = None if places is None else places * opened.record_bytes
        records = HostRecords(opened, device, limit, readers=2)
        assert HostToDevice(records, device, slots).chunk_bytes == chunk_bytes
        records.close()


# -- urgency ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("readers", [1, 2])
def test_a_demand_load_waits_for_one_copy_a_reader_and_the_prefetch_resumes(
    opened: Store, make: MakeTiers, gated: GatedDevice, readers: int
) -> None:
    tiers = make(gated, readers=readers)
    let_demand_overtake(tiers, gated.gate, readers)
    begun = [divmod(target.storage_offset() // opened.record_bytes, 8) for target in gated.gate.begun]
    check_demand_overtook(begun, opened, readers)


@pytest.mark.parametrize("readers", [1, 2])
def test_a_demand_load_waits_for_one_read_a_reader_where_the_disk_is_on_the_way(
    opened: Store, make: MakeTiers, monkeypatch: pytest.MonkeyPatch, readers: int
) -> None:
    gate = Gate(opened, SMALL, monkeypatch)
    gate.let_through(1)  # the read that tries out direct reads
    tiers = make(SimulatedDevice(None, 0.0, 1 << 30), 3, readers, fill=False)
    gate.begun.clear()
    let_demand_overtake(tiers, gate, readers)
    check_demand_overtook([key for key, _ in gate.begun], opened, readers)


def let_demand_overtake(tiers: Tiers, gate: Turnstile, readers: int) -> None:
    """Load (0, 0) ahead, and (1, 1) on demand once every reader is at work."""
    tiers.load((0, 0), demand=False)
    gate.wait_begun(readers)
    tiers.load((1, 1))
    gate.let_through_singly(2 * chunks_of(tiers.records.record_bytes((0, 0))))
    tiers.listener.wait(2)
    assert tiers.listener.keys == [(1, 1), (0, 0)]


def check_demand_overtook(begun: list[ExpertKey], store: Store, readers: int) -> None:
    chunks = chunks_of(store.record_bytes)
    assert begun == [(0, 0)] * readers + [(1, 1)] * chunks + [(0, 0)] * (chunks - readers)


def chunks_of(nbytes: int) -> int:
    return -(-nbytes // SMALL)


def test_a_cancelled_prefetch_frees_its_slot_after_the_copy_at_work(
    make: MakeTiers, gated: GatedDevice, expected: dict[ExpertKey, torch.Tensor]
) -> None:
    tiers = make(gated)
    tiers.load((0, 0), demand=False)
    gated.gate.wait_begun(1)
    tiers.link.cancel((0, 0))
    with pytest.raises(ValueError, match="already"):
        tiers.link.submit(Load((2, 2), 0))
    gated.gate.let_through(1)
    (finished,) = tiers.listener.wait(1)
    assert finished.dropped and finished.nbytes == SMALL and len(gated.gate.begun) == 1
    gated.gate.let_through()
    tiers.link.submit(Load((2, 2), 0))
    tiers.listener.wait(2)
    assert torch.equal(tiers.slots[0], expected[(2, 2)])


# -- slots that compute has read --------------------------------------------------------------------------------------


def test_a_copy_waits_for_the_last_use_of_its_own_slot(make: MakeTiers) -> None:
    device = WatchedDevice()
    tiers = make(device)
    tiers.carrier.used([0, 3])
    tiers.carrier.used([3, 5])
    for key, after in (((0, 0), 1), ((0, 3), 2), ((0, 5), 2), ((0, 1), None)):
        device.afters.clear()
        tiers.listener.told.clear()
        tiers.load(key)
        tiers.listener.wait(1)
        assert set(device.afters) == {after}


@pytest.mark.parametrize("name", DEVICES)
def test_a_slot_is_not_overwritten_under_compute_that_reads_it(
    make: MakeTiers, expected: dict[ExpertKey, torch.Tensor], name: str
) -> None:
    tiers = make(open_device(name))
    tiers.load((0, 0))
    tiers.listener.wait(1)
    if tiers.slots.is_cuda:
        torch.cuda._sleep(50_000_000)
    read = tiers.slots[0].clone()
    tiers.carrier.used([0])
    tiers.link.submit(Load((0, 1), 0))
    tiers.listener.wait(2)
    assert torch.equal(read.cpu(), expected[(0, 0)])
    assert torch.equal(tiers.slots[0].cpu(), expected[(0, 1)])


# -- faults -----------------------------------------------------------------------------------------------------------


def test_a_record_that_cannot_be_read_is_named_and_the_others_arrive(
    opened: Store, make: MakeTiers, expected: dict[ExpertKey, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers = make(WatchedDevice(), 2, 2)
    (first, nbytes), real = opened.location((1, 3)), os.preadv

    def fail(fd: int, buffers: list[memoryview], offset: int) -> int:
        if first + SMALL <= offset < first + nbytes:  # from its second chunk on
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers, offset)

    monkeypatch.setattr(disk, "RETRY_PAUSES", (0.001,))
    monkeypatch.setattr(os, "preadv", fail)
    tiers.load(*expected)
    errors = {finished.key: finished.error for finished in tiers.listener.wait(len(expected)) if finished.error}
    assert list(errors) == [(1, 3)]
    assert opened.record_name((1, 3)) in str(errors[(1, 3)]) and "Input/output error" in str(errors[(1, 3)])
    assert all(torch.equal(tiers.slot(key), record) for key, record in expected.items() if key != (1, 3))
    monkeypatch.setattr(os, "preadv", real)
    tiers.load((1, 3))  # the disk has recovered
    assert tiers.listener.wait(len(expected) + 1)[-1].error is None
    assert torch.equal(tiers.slot((1, 3)), expected[(1, 3)])


def test_short_reads_go_on(
    make: MakeTiers, expected: dict[ExpertKey, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers, real = make(WatchedDevice(), 2, 2), os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, to, offset: real(fd, [to[0][:12288]], offset))
    tiers.load(*expected)
    assert not any(finished.error for finished in tiers.listener.wait(len(expected)))
    assert all(torch.equal(tiers.slot(key), record) for key, record in expected.items())


def test_a_file_that_ends_early_is_named(opened: Store, make: MakeTiers) -> None:
    tiers = make(WatchedDevice(), 2, 2)
    offset, nbytes = opened.location((2, 7))
    os.truncate(opened.experts_path, offset + nbytes - 5000)
    tiers.load((2, 7))
    (finished,) = tiers.listener.wait(1)
    assert "the file ended early" in str(finished.error) and opened.record_name((2, 7)) in str(finished.error)


def test_a_copy_that_the_device_refuses_names_record_and_device(opened: Store, make: MakeTiers) -> None:
    class Broken(WatchedDevice):
        def copy(self, target: torch.Tensor, source: torch.Tensor, after: object) -> None:
            raise RuntimeError("CUDA error: unspecified launch failure\nCompile with `TORCH_USE_CUDA_DSA`")

    tiers = make(Broken())
    tiers.load((1, 1))
    (finished,) = tiers.listener.wait(1)
    name = opened.record_name((1, 1))
    assert str(finished.error) == (
        f"record {name} cannot be copied to simulated (CUDA error: unspecified launch failure)"
    )


@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 1), (1, 0)], ids=["touched", "damaged", "repaired"])
def test_a_file_that_changes_while_a_record_has_lost_its_place_is_read_again(
    opened: Store, make: MakeTiers, gated: GatedDevice, expected: dict[ExpertKey, torch.Tensor], before: int, after: int
) -> None:
    tiers, first = make(gated, places=1), int(expected[(1, 1)][0])

    def write_first_byte(byte: int) -> None:
        with opened.experts_path.open("r+b") as stream:
            stream.seek(opened.location((1, 1))[0])
            stream.write(bytes([byte]))

    write_first_byte(first ^ before)
    tiers.load((1, 1), demand=False)
    gated.gate.wait_begun(1)  # its first chunk has been read
    tiers.load((2, 2))  # takes the only place
    write_first_byte(first ^ after)
    gated.gate.let_through()
    errors = {finished.key: finished.error for finished in tiers.listener.wait(2)}
    assert errors[(2, 2)] is None and torch.equal(tiers.slot((2, 2)), expected[(2, 2)])
    if after:
        assert opened.record_name((1, 1)) in str(errors[(1, 1)]) and "damaged" in str(errors[(1, 1)])
    else:
        assert errors[(1, 1)] is None and torch.equal(tiers.slot((1, 1)), expected[(1, 1)])


def test_slots_of_a_closed_carrier_stay_as_they_are_when_a_disk_that_hung_answers(
    opened: Store, make: MakeTiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(opened, SMALL, monkeypatch)
    gate.let_through(1)
    tiers = make(WatchedDevice(), 2, 1, fill=False)
    gate.begun.clear()
    tiers.load((0, 0))
    gate.wait_begun(1)
    readers = [thread for thread in threading.enumerate() if thread.name.startswith("reader-")]
    tiers.link.close_later()
    tiers.carrier.close()
    tiers.slots.fill_(7)
    gate.let_through()
    for reader in readers:
        reader.join(5)
        assert not reader.is_alive()
    assert (tiers.slots == 7).all()
    with pytest.raises(ForegateError, match="given up"):
        tiers.carrier.carry((0, 0), 0, 0, SMALL)
