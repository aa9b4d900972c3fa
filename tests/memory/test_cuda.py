"""The CUDA device's own lines without a card: what it asks of CUDA, in which order. With one, see test_devices.py."""

from contextlib import nullcontext
from unittest.mock import Mock, create_autospec

import pytest
import torch

from foregate.errors import ForegateError
from foregate.memory.cuda import CudaDevice


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Stands for a card; its calls in order. Streams and events have PyTorch's own methods, and those only."""
    calls = Mock()
    calls.stream = create_autospec(torch.cuda.Stream, instance=True)
    calls.event = create_autospec(torch.cuda.Event, instance=True)
    calls.cudart.cudaHostRegister.return_value = 0
    fakes = {
        "device_count": lambda: 1,
        "mem_get_info": lambda device: (3, 4),
        "Stream": lambda device: calls.stream,
        "Event": calls.new_event,
        "current_stream": calls.current_stream,
        "cudart": lambda: calls.cudart,
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
    }
    calls.new_event.return_value = calls.event
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return calls


def names(calls: Mock) -> list[str]:
    return [name for name, _, _ in calls.mock_calls]


def test_a_card_that_is_not_here_is_a_clear_error() -> None:
    with pytest.raises(ForegateError, match=r"cuda:99 is not here.*nvidia-smi"):
        CudaDevice(99)


def test_a_copy_waits_for_the_mark_on_the_device_and_for_itself_on_the_host(cuda: Mock) -> None:
    device, mark = CudaDevice(), object()
    target, source = torch.zeros(8, dtype=torch.uint8), torch.arange(8, dtype=torch.uint8)
    cuda.event.synchronize.side_effect = lambda: cuda.copied(target.tolist() == source.tolist())
    device.copy(target, source, mark)
    assert names(cuda) == ["new_event", "stream.wait_event", "event.record", "event.synchronize", "copied"]
    cuda.new_event.assert_called_once_with(blocking=True)
    cuda.stream.wait_event.assert_called_once_with(mark)
    cuda.event.record.assert_called_once_with(cuda.stream)
    cuda.copied.assert_called_once_with(True)


def test_buffers_are_pinned_whole_and_let_go_once(cuda: Mock) -> None:
    device = CudaDevice()
    buffer = device.host_buffer(5 * 4096)
    assert device.path == "pinned"
    cuda.cudart.cudaHostRegister.assert_called_once_with(buffer.data_ptr(), 5 * 4096, 0)
    device.release(buffer)
    device.release(buffer)
    cuda.cudart.cudaHostUnregister.assert_called_once_with(buffer.data_ptr())


def test_memory_that_cannot_be_pinned_is_used_as_it_is_and_noted_once(cuda: Mock) -> None:
    device = CudaDevice()
    pinned = device.host_buffer(4096)
    cuda.cudart.cudaHostRegister.return_value = 2
    with pytest.warns(RuntimeWarning, match=r"cannot be pinned \(CUDA error 2\).*ulimit -l") as noted:
        others = [device.host_buffer(4096) for _ in range(3)]
    assert len(noted) == 1 and cuda.cudart.cudaHostRegister.call_count == 2
    assert device.path == "unpinned"
    for buffer in (pinned, *others):
        device.release(buffer)
    cuda.cudart.cudaHostUnregister.assert_called_once_with(pinned.data_ptr())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_refusal_to_pin_spoils_no_later_kernel() -> None:
    device = CudaDevice()
    buffer = device.host_buffer(4096)
    with pytest.warns(RuntimeWarning, match="cannot be pinned"):
        device._pin(buffer)  # pinned already: refused
    assert torch.ones(8, device=device.torch_device).sum().item() == 8
    device.release(buffer)
