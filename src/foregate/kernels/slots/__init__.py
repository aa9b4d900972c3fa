"""Kernels on slots by name."""

import torch
from torch import nn

from foregate.checkpoint.store import RecordLayout
from foregate.errors import ForegateError
from foregate.kernels.activation import apply_activation, find_activation
from foregate.kernels.slots.base import Rows, SlotKernel
from foregate.kernels.slots.reference import SlotReference

AUTO = "auto"
NAMES = ("triton", SlotReference.name)


def choose_slot_kernel(name: str, experts: nn.Module, layout: RecordLayout, slots: torch.Tensor) -> SlotKernel:
    """A layer's kernel on the slots of a device: "triton", "reference", or "auto" for Triton where it can compute these
    experts there, otherwise the reference, whose note says why.

    Raises ForegateError for an unknown name, or where Triton was asked for and cannot.
    """
    if name not in (AUTO, *NAMES):
        raise ForegateError(f"unknown kernel {name}: choose one of {', '.join((AUTO, *NAMES))}")
    if name == SlotReference.name:
        return SlotReference(experts, layout, slots)
    kernel = _triton(experts, layout, slots)
    if isinstance(kernel, SlotKernel):
        return kernel
    if name == AUTO:
        return SlotReference(experts, layout, slots, kernel)
    raise ForegateError(f"the triton kernel cannot run here: {kernel}")


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


__all__ = ["AUTO", "NAMES", "Rows", "SlotKernel", "SlotReference", "choose_slot_kernel"]
