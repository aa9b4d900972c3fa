"""The native quantizers: a ctypes binding of `foregate/native/quantize.cpp`.

They compute what `BlockQuantizer.reference_planes` computes, up to rounding, at about a hundred times its speed.
"""

import ctypes
import math
import warnings
from functools import cache

import torch

from foregate.quantize.base import Problem, Stored
from foregate.quantize.matrix import plane_shapes, scale_table

_METHODS = {"rtn": 0, "hqq": 1, "refit": 2}  # enum class Method


@cache
def load_library() -> ctypes.CDLL | None:
    """The native library with its quantizers declared; None, after a warning, where there is none."""
    from foregate.kernels import cpu  # not above: kernels build on the store, and the store on this package

    reason = cpu.why_not()
    found = None if reason else cpu._library()
    if found is None or not hasattr(found, "fg_quantize"):
        reason = reason or "the native library has no quantizers"
        warnings.warn(f"quantizing slowly, with PyTorch: {reason}", RuntimeWarning, stacklevel=2)
        return None
    pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    found.fg_quantize_base.argtypes = [pointer, long, long, integer]
    found.fg_quantize_base.restype = ctypes.c_float
    found.fg_quantize.argtypes = [
        *(pointer, long, long, integer, integer),  # weight, rows, cols, bits, method
        *(pointer, pointer, ctypes.c_float),  # importance, table, base
        *(pointer, pointer, pointer, pointer),  # low, high, scales, zeros or groups
        pointer,  # squares
    ]
    found.fg_quantize.restype = ctypes.c_int
    return found


def base(library: ctypes.CDLL, problem: Problem) -> float:
    """The base of the problem's weight: as `grid.greatest_scale`."""
    greatest = library.fg_quantize_base(problem.weight.data_ptr(), *problem.weight.shape, problem.bits)
    if math.isnan(greatest):
        raise RuntimeError("the native quantizers could not start their threads")
    return greatest


def stored(library: ctypes.CDLL, method: str, problem: Problem, base: float) -> Stored:
    """What the quantizer called `method` stores of the problem's weight, for a base above 0."""
    weight, bits, importance = problem.weight, problem.bits, problem.importance
    shapes = plane_shapes(bits, *weight.shape)
    made = {plane: torch.empty(shape, dtype=dtype) for plane, (dtype, shape) in shapes.items()}
    made["base"][0] = base
    table, squares = scale_table(), torch.zeros(2, dtype=torch.float64)
    status = library.fg_quantize(
        *(weight.data_ptr(), *weight.shape, bits, _METHODS[method]),
        *(None if importance is None else importance.data_ptr(), table.data_ptr(), base),
        *(made["low"].data_ptr(), made["high"].data_ptr() if "high" in made else None),
        *(made["scales"].data_ptr(), made["groups" if bits == 2 else "zeros"].data_ptr()),
        squares.data_ptr(),
    )
    if status:
        raise RuntimeError("the native quantizers could not start their threads")
    return Stored(made, *squares.tolist())
