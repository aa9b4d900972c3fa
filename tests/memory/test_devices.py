"""What every device promises, on all that this machine has."""

from collections.abc import Iterator

import pytest
import torch
from devices import DEVICES, open_device

from foregate.errors import ForegateError
from foregate.memory.device import Device


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    yield open_device(request.param)


@pytest.fixture
def source(device: Device) -> Iterator[torch.Tensor]:
    """Host memory of the device with bytes to be told apart."""
    buffer = device.host_buffer(1 << 20)
    buffer.copy_(torch.arange(1 << 20) % 251)
    yield buffer
    device.release(buffer)


def long_compute(device: Device) -> None:
    """Keeps a card busy for some milliseconds; other compute waits behind it."""
    if device.torch_device.type == "cuda":
        torch.cuda._sleep(50_000_000)


def test_memory_is_known_when_it_is_opened(device: Device) -> None:
    assert 0 < device.free_bytes <= device.total_bytes


def test_slots_lie_on_the_device(device: Device) -> None:
    slots = device.slots(3, 8192)
    assert (slots.shape, slots.dtype, slots.device) == ((3, 8192), torch.uint8, device.torch_device)
    assert slots.is_contiguous()


def test_slots_that_do_not_fit_are_refused(device: Device) -> None:
    with pytest.raises(ForegateError, match=r"GiB for experts do not fit.*give less with --memory"):
        device.slots(1000, device.total_bytes // 4096 * 4096)


def test_host_buffers_are_what_direct_reads_need(device: Device) -> None:
    buffer = device.host_buffer(3 * 4096)
    assert (buffer.shape, buffer.dtype, buffer.device.type) == ((3 * 4096,), torch.uint8, "cpu")
    assert buffer.data_ptr() % 4096 == 0
    device.release(buffer)


def test_a_piece_lands_where_it_belongs_and_nowhere_else(device: Device, source: torch.Tensor) -> None:
    slots = device.slots(3, 1 << 20)
    slots.zero_()
    device.copy(slots[1, 4096:12288], source[4096:12288], None)
    expected = torch.zeros(3, 1 << 20, dtype=torch.uint8)
    expected[1, 4096:12288] = source[4096:12288]
    assert torch.equal(slots.cpu(), expected)


def test_a_copy_waits_for_compute_before_its_mark(device: Device, source: torch.Tensor) -> None:
    slots = device.slots(1, 1 << 20)
    slots.zero_()
    long_compute(device)
    before = slots.clone()  # compute that reads the slot
    mark = device.mark()
    device.copy(slots[0], source, mark)
    assert not before.any()
    assert torch.equal(slots[0].clone().cpu(), source)  # compute that is queued afterwards


def test_slots_and_buffers_made_in_inference_mode_can_be_written_outside(device: Device) -> None:
    """The engine may have to make them again in the middle of a user's run; threads of the link write to them."""
    with torch.inference_mode():
        slots, buffer = device.slots(1, 4096), device.host_buffer(4096)
    device.copy(slots[0], buffer, None)
    device.release(buffer)


def test_small_copies_to_the_host_are_of_what_was_there(device: Device) -> None:
    ids = torch.arange(12, device=device.torch_device).view(3, 4)
    weights = torch.rand(3, 4, device=device.torch_device)
    long_compute(device)
    ids += 1
    copies = device.to_host(ids, weights.T)
    ids.zero_()
    got_ids, got_weights = copies.wait()
    assert got_ids.device.type == got_weights.device.type == "cpu"
    assert torch.equal(got_ids, torch.arange(1, 13).view(3, 4)) and torch.equal(got_weights, weights.T.cpu())
