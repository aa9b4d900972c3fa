"""A model's backbone on a device: its dtype, its size, and the way there."""

import torch
from torch import nn
from transformers import PreTrainedModel

from foregate.checkpoint.architecture import Architecture
from foregate.checkpoint.store import Store
from foregate.errors import ForegateError
from foregate.memory.budget import Budget
from foregate.memory.device import Device
from foregate.model.linear import read_matrices
from foregate.model.regions import Regions, can_be_captured


def compute_dtype(device: Device) -> torch.dtype:
    """What the backbone computes in: bfloat16 on a card, float32 where the host computes."""
    return torch.bfloat16 if device.torch_device.type == "cuda" else torch.float32


def backbone_bytes(architecture: Architecture, dtype: torch.dtype) -> int:
    """Bytes of everything but the experts on a device; tied weights count once."""
    experts = {f"{layer.name}.{name}" for layer in architecture.layers for name in layer.params}
    model = architecture.model
    return sum(
        param.numel() * (torch.float32 if _stays_float32(model, name) else dtype).itemsize
        for name, param in model.named_parameters()
        if name not in experts
    )


def check_room(budget: Budget, device: Device, top_k: int) -> None:
    """Raise ForegateError if a device has no room for what is planned there: with the plan, and the most that fits."""
    free, slot_bytes = device.free_bytes, budget.slot_bytes
    if budget.total_bytes <= free:
        return
    plan = (
        f"backbone {budget.backbone_bytes / 2**20:,.0f} MiB and {budget.slots} experts of {slot_bytes / 2**20:,.1f} MiB "
        f"do not fit, {device.name} has {free / 2**20:,.0f} MiB free"
    )
    if budget.backbone_bytes + top_k * slot_bytes > free:
        raise ForegateError(f"{plan}: not even {top_k} experts, which one layer needs, have room beside the backbone")
    raise ForegateError(f"{plan}: the most that fits is --memory {free // 2**20}MiB")


def dequantize_linears(model: PreTrainedModel, store: Store) -> None:
    """Put plain linear modules in the place of quantized ones: a device multiplies them by its own libraries."""
    if not store.matrices:
        return
    for info, matrix in zip(store.matrices, read_matrices(store), strict=True):
        quantized = model.get_submodule(info.module)
        with torch.device("meta"):
            linear = nn.Linear(quantized.in_features, quantized.out_features, bias=False)
        linear.weight = nn.Parameter(matrix.dequantize(), requires_grad=False)
        linear.bias = quantized.bias
        model.set_submodule(info.module, linear.eval())


def move(model: PreTrainedModel, device: Device, dtype: torch.dtype) -> None:
    """Move a backbone to the device, its parameters in `dtype` but for those that the family keeps in float32.

    Buffers, such as rotary frequencies, keep their precision.
    """
    for name, param in model.named_parameters():
        param.data = param.data.to(device.torch_device, param.dtype if _stays_float32(model, name) else dtype)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device.torch_device)
    model.config.dtype = dtype


def capture(model: PreTrainedModel, device: Device) -> Regions | None:
    """Have a backbone on a card captured for decode steps; None where it runs eagerly."""
    if device.torch_device.type != "cuda" or not can_be_captured(model):
        return None
    return Regions(model, mode="reduce-overhead")


def _stays_float32(model: PreTrainedModel, name: str) -> bool:
    """Whether the family keeps a parameter in float32, as transformers decides it when it loads in bfloat16."""
    kept = model._keep_in_fp32_modules_strict or ()
    return any(f".{part}." in f".{name}." for part in kept)
