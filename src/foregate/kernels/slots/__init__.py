"""Kernels on slots by name."""

import torch
from torch import nn

from foregate.checkpoint.store import RecordLayout
from foregate.errors import ForegateError
from foregate.kernels import cpu
from foregate.kernels.activation import apply_activation, find_activation
from foregate.kernels.slots.base import Rows, SlotKernel
from foregate.kernels.slots.native import SlotNative
from foregate.kernels.slots.reference import SlotReference

AUTO = "auto"
NAMES = ("triton", SlotNative.name, SlotReference.name)


def choose_slot_kernel(name: str, experts: nn.Module, layout: RecordLayout, slots: torch.Tensor) -> SlotKernel:
    """A layer's kernel on the slots of a device: "triton", "cpu" (native), "reference", or "auto".

    "auto" is the native kernel where the device's memory is the host's, elsewhere Triton where it can compute these
    experts, and otherwise the reference, whose note says why. Raises ForegateError for an unknown name, and where what
    was asked for cannot run.
    """
    if name not in (AUTO, *NAMES):
        raise ForegateError(f"unknown kernel {name}: choose one of {', '.join((AUTO, *NAMES))}")
    if name == SlotReference.name:
        return SlotReference(experts, layout, slots)
    host = name == SlotNative.name or (name == AUTO and not slots.is_cuda)
    kernel = (_native if host else _triton)(experts, layout, slots)
    if isinstance(kernel, SlotKernel):
        return kernel
    if name == AUTO:
        return SlotReference(experts, layout, slots, kernel)
    raise ForegateError(f"the {name} kernel cannot run here: {kernel}")


def _native(experts: nn.Module, layout: RecordLayout, slots: torch.Tensor) -> SlotKernel | str:
    """The native kernel, or why there is none."""
    if slots.device.type != "cpu":
        return f"the native kernels read the host's memory, the slots are on {slots.device}"
    if not cpu.available():
        return cpu.why_not()
    return SlotNative(experts, layout, slots)


def _triton(experts: nn.Module, layout: RecordLayout, slots: torch.Tensor) -> SlotKernel | str:
    """The Triton kernel, or why there is none."""
    try:
        from foregate.kernels.triton import TritonKernel, why_not
        from foregate.kernels.triton.record import record_places
    except ImportError as error:
        return f"{error}: install triton"
    reason = why_not(slots.device)
    if reason is not None:
        return reason
    places = record_places(layout)
    if isinstance(places, str):
        return places
    activation = find_activation(experts, apply_activation)
    if activation is None:
        return f"the Triton kernels do not know the activation of {type(experts).__name__}"
    return TritonKernel(experts, layout, slots, activation, places)


__all__ = ["AUTO", "NAMES", "Rows", "SlotKernel", "SlotNative", "SlotReference", "choose_slot_kernel"]
