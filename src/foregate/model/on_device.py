"""A model's backbone on its way to a device."""

import torch
from torch import nn
from transformers import PreTrainedModel

from foregate.checkpoint.store import Store
from foregate.memory.device import Device
from foregate.memory.needs import parameter_dtype
from foregate.model.linear import read_matrices
from foregate.model.regions import Regions, can_be_captured


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
        param.data = param.data.to(device.torch_device, parameter_dtype(model, name, dtype))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device.torch_device)
    model.config.dtype = dtype


def capture(model: PreTrainedModel, device: Device) -> Regions | None:
    """Have a backbone on a card captured for decode steps; None where it runs eagerly."""
    if device.torch_device.type != "cuda" or not can_be_captured(model):
        return None
    return Regions(model, mode="reduce-overhead")
