"""Kernels by name."""

import torch

from foregate.errors import ForegateError
from foregate.kernels import cpu
from foregate.kernels.base import Kernel, Product, Work
from foregate.kernels.native import NativeKernel
from foregate.kernels.reference import ReferenceKernel

KERNELS: dict[str, type[Kernel]] = {kernel.name: kernel for kernel in (NativeKernel, ReferenceKernel)}
AUTO = "auto"


def choose_kernel(name: str) -> tuple[type[Kernel], str]:
    """The kernel called `name` and why it was chosen; "auto" is the fastest that works here.

    Raises ForegateError for an unknown name, or one that cannot run here.
    """
    if name == AUTO:
        if cpu.available():
            return NativeKernel, f"native, {cpu.isa()}"
        return ReferenceKernel, f"PyTorch, slow: {cpu.why_not()}"
    if name not in KERNELS:
        raise ForegateError(f"unknown kernel {name}: choose one of {', '.join([AUTO, *KERNELS])}")
    if name == NativeKernel.name and not cpu.available():
        raise ForegateError(f"the cpu kernel cannot run here: {cpu.why_not()}")
    return KERNELS[name], "as asked for"


def set_threads(count: int) -> None:
    """Let `count` threads compute, in PyTorch and in the native kernels, for the whole process."""
    torch.set_num_threads(count)
    if cpu.available():
        cpu.set_threads(count)


__all__ = ["AUTO", "KERNELS", "Kernel", "Product", "Work", "choose_kernel", "set_threads"]
