"""Widening tensors: entries are repeated, and where a sum runs over the copies, each copy carries a share of it.

The shares are powers of two that add up to one, so multiplying by them is exact in every floating-point format.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

PIECE_BYTES = 32 << 20


@dataclass(frozen=True)
class Axis:
    """How one dimension of a tensor grows: every run of `unit` entries is repeated `copies` times in a row."""

    unit: int
    copies: int
    shared: bool  # whether each copy is multiplied by its share

    @property
    def factors(self) -> list[float]:
        """What each copy is multiplied by."""
        return shares(self.copies) if self.shared else [1.0] * self.copies


Axes = tuple[Axis | None, ...]  # by dimension; None: it stays


def shares(copies: int) -> list[float]:
    """`copies` powers of two that add up to one, as even as they can be: for 3 copies 1/2, 1/4, 1/4."""
    exponent = copies.bit_length() - 1
    larger = 2 ** (exponent + 1) - copies
    return [2.0**-exponent] * larger + [2.0 ** -(exponent + 1)] * (copies - larger)


def wide_shape(shape: Sequence[int], axes: Axes) -> tuple[int, ...]:
    """The shape of a tensor of `shape` after widening."""
    return tuple(size * axis.copies if axis else size for size, axis in zip(shape, axes, strict=True))


def widen(tensor: torch.Tensor, axes: Axes) -> torch.Tensor:
    """The widened tensor, contiguous and of the same dtype."""
    for dim, axis in enumerate(axes):
        if axis:
            runs = tensor.unflatten(dim, (-1, axis.unit))
            tensor = torch.stack([_times(runs, factor) for factor in axis.factors], dim + 1).flatten(dim, dim + 2)
    return tensor.contiguous()


def wide_pieces(tensor: torch.Tensor, axes: Axes) -> Iterator[torch.Tensor]:
    """`widen(tensor, axes)` cut along the first dimension into pieces of about PIECE_BYTES, or one row if that is more."""
    first, rest = axes[0], axes[1:]
    row_bytes = torch.Size(wide_shape(tensor.shape[1:], rest)).numel() * tensor.element_size()
    count = max(1, PIECE_BYTES // max(1, row_bytes))
    for run in tensor.split(first.unit if first else len(tensor)):
        for factor in first.factors if first else (1.0,):
            for rows in run.split(count):
                yield _times(widen(rows, (None, *rest)), factor)


def _times(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    return tensor if factor == 1 else tensor * factor
