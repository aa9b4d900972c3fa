"""The Triton kernels: experts from packed records in the memory of a CUDA device.

Without a card they run under Triton's interpreter, one program after the other in NumPy, where `TRITON_INTERPRET=1` was
set before they were imported: for tests.
"""

import torch
import triton

from foregate.kernels.triton.kernel import TritonKernel

CAPABILITY = (7, 5)  # the oldest cards: Turing


def why_not(device: torch.device) -> str | None:
    """Why the kernels cannot run on this device; None: they can."""
    if triton.knobs.runtime.interpret:
        return None if device.type == "cpu" else "Triton's interpreter computes in the CPU's memory"
    if device.type != "cuda":
        return f"the Triton kernels need a CUDA device, not {device.type}"
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        return f"the card has compute capability {found[0]}.{found[1]}, the Triton kernels need 7.5"
    return None


__all__ = ["TritonKernel", "why_not"]
