"""The quantizers' interface, and what they all do before they quantize: check, convert and bring into range."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from foregate.errors import ForegateError
from foregate.quantize.matrix import BITS, QuantizedMatrix

# Squares and reciprocals of weights must be ordinary float32 numbers. A matrix whose greatest magnitude lies outside
# 2**-LIMIT..2**LIMIT is divided by a power of two, and its base is multiplied by it at the end.
_EXPONENT_LIMIT = 30
_LEAST_IMPORTANCE = 1e-4  # of the mean: columns that calibration never saw still keep sensible values


class Quantizer(ABC):
    """Makes quantized matrices. Stateless: one instance serves any number of matrices and threads."""

    name: ClassVar[str]
    uses_inputs: ClassVar[bool] = False  # an importance or a Hessian changes what it does
    needs_inputs: ClassVar[bool] = False  # without a Hessian it is another quantizer

    @abstractmethod
    def quantize(
        self,
        weight: torch.Tensor,
        bits: int,
        importance: torch.Tensor | None = None,
        hessian: torch.Tensor | None = None,
        *,
        samples: int | None = None,
        name: str = "the matrix",
    ) -> QuantizedMatrix:
        """The matrix y = W x with fewer bits.

        weight: [rows, cols] (outputs by inputs), float32, float16 or bfloat16. bits: 2, 3, 4 or 8.
        importance: [cols], how much the squared error of a column's weights counts, for instance the mean square of
        the input; only ratios matter. hessian: [cols, cols], X^T X of inputs X [samples, cols] that the matrix really
        sees, not divided by anything. samples: how many there were, if known. A quantizer ignores what it has no use
        for. name: how messages name the matrix.

        The same arguments give the same bytes, however many threads work. Raises ForegateError when a weight, an
        importance or the Hessian is not finite, and ValueError for shapes or bits that cannot be.
        """


@dataclass(frozen=True)
class Problem:
    """A checked matrix, ready to be quantized."""

    weight: torch.Tensor  # float32 [rows, cols], contiguous, greatest magnitude 0 or within 2**-30..2**30
    exponent: int  # the caller's matrix is weight * 2**exponent
    bits: int
    importance: torch.Tensor | None  # float32 [cols], positive, mean about 1

    def finish(self, planes: dict[str, torch.Tensor]) -> QuantizedMatrix:
        """The planes of `weight` as the caller's matrix."""
        # ldexp of a double: float32 powers of two end at 2**127, and rounding must happen once.
        planes["base"] = torch.ldexp(planes["base"].double(), torch.tensor(self.exponent)).float()
        return QuantizedMatrix(self.bits, *self.weight.shape, planes)


@dataclass(frozen=True)
class Stored:
    """A quantized problem, with what becomes of its norm."""

    planes: dict[str, torch.Tensor]
    given_squares: float  # sum of importance * w**2 over the problem's weight
    stored_squares: float  # the same sum over what the planes hold

    def keep_norm(self) -> dict[str, torch.Tensor]:
        """The planes, scaled so that the (weighted) norm of what they hold is that of the problem's weight."""
        gain = math.sqrt(self.given_squares / self.stored_squares) if self.stored_squares else 1.0
        return self.planes | {"base": (self.planes["base"].double() * gain).float()}


def prepare(weight: torch.Tensor, bits: int, importance: torch.Tensor | None, name: str) -> Problem:
    """Checks what a caller gave; see `Quantizer.quantize` for what is raised."""
    if bits not in BITS:
        raise ValueError(f"a quantized matrix has {', '.join(map(str, BITS))} bits, not {bits}")
    if weight.dim() != 2 or weight.numel() == 0 or not weight.dtype.is_floating_point:
        raise ValueError(f"{name} is {weight.dtype} {tuple(weight.shape)}, not a matrix of floats")
    weight = weight.detach().to("cpu", torch.float32).contiguous()
    low, high = weight.aminmax()  # both pass NaN on
    greatest = max(-float(low), float(high))
    if not (math.isfinite(float(low)) and math.isfinite(greatest)):
        raise ForegateError(f"{name} has weights that are NaN or infinite and cannot be quantized")
    exponent = math.frexp(greatest)[1] if greatest else 0
    if abs(exponent) <= _EXPONENT_LIMIT:
        exponent = 0
    else:
        weight = torch.ldexp(weight.double(), torch.tensor(-exponent)).float()
    if importance is not None:
        importance = _prepare_importance(importance, weight.shape[1], name)
    return Problem(weight, exponent, bits, importance)


def _prepare_importance(importance: torch.Tensor, cols: int, name: str) -> torch.Tensor | None:
    if importance.shape != (cols,):
        raise ValueError(f"{name} has {cols} columns, its importance has the shape {tuple(importance.shape)}")
    importance = importance.detach().to("cpu", torch.float64)
    if not torch.isfinite(importance).all() or (importance < 0).any():
        raise ForegateError(f"the importance of {name} has values that are negative, NaN or infinite")
    mean = importance.mean()
    if mean == 0:
        return None
    return (importance / mean).clamp(min=_LEAST_IMPORTANCE).float().contiguous()
