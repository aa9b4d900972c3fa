"""Quantizers that treat every block on its own: natively where the library is there, else in PyTorch."""

from abc import abstractmethod
from typing import ClassVar

import torch

from foregate.quantize import native
from foregate.quantize.base import Problem, Quantizer, Stored, prepare
from foregate.quantize.grid import (
    Choice,
    Grid,
    blocks_of,
    codes_of,
    greatest_scale,
    grid_planes,
    planes_of,
)
from foregate.quantize.matrix import QuantizedMatrix, plane_shapes

_CHUNK = 1 << 21  # weights that PyTorch quantizes at once: its intermediate tensors should stay in the cache


class BlockQuantizer(Quantizer):
    """A subclass says what a block's scale and zero points shall be; everything else is here."""

    keeps_norm: ClassVar[bool] = False

    @abstractmethod
    def choose(self, grid: Grid, w: torch.Tensor, h: torch.Tensor) -> Choice:
        """What to store for the blocks w [blocks, groups, size] with importance h of the same shape.

        Padding has weight 0 and importance 0.
        """

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
        if importance is None and hessian is not None:
            importance = hessian.diagonal()
        problem = prepare(weight, bits, importance if self.uses_inputs else None, name)
        stored = self.stored(problem)
        return problem.finish(stored.keep_norm() if self.keeps_norm else stored.planes)

    def stored(self, problem: Problem, base: float | None = None) -> Stored:
        """A problem's weight, quantized; `base` overrides the one that fits the weight."""
        library = native.load_library()
        if base is None:
            base = native.base(library, problem) if library else greatest_scale(problem.weight, problem.bits)
        if base == 0:
            shapes = plane_shapes(problem.bits, *problem.weight.shape)
            return Stored({plane: torch.zeros(shape, dtype=dtype) for plane, (dtype, shape) in shapes.items()}, 0, 0)
        if library:
            return native.stored(library, self.name, problem, base)
        return self.reference(problem, base)

    def reference(self, problem: Problem, base: float) -> Stored:
        """The same by way of `choose`: what the native library computes, up to rounding. base must be above 0."""
        weight, bits = problem.weight, problem.bits
        cols = weight.shape[1]
        grid = Grid(bits, base)
        importance = torch.ones(cols) if problem.importance is None else problem.importance
        codes, grids, given, stored = [], [], 0.0, 0.0
        for part in weight.split(max(1, _CHUNK // cols)):
            w, h = blocks_of(part, bits), blocks_of(importance.expand_as(part), bits)
            choice = self.choose(grid, w, h)
            grids.append(grid_planes(choice, bits, len(part)))
            scale, zero = grid.restore(choice)
            q = codes_of(w, scale, zero, grid.layout.top)
            given += float((h * w**2).sum(dtype=torch.float64))
            stored += float((h * ((q - zero.unsqueeze(-1)) * scale.unsqueeze(-1)) ** 2).sum(dtype=torch.float64))
            codes.append(q.reshape(len(part), -1)[:, :cols])
        joined = {plane: torch.cat([g[plane] for g in grids]) for plane in grids[0]}
        return Stored(planes_of(base, torch.cat(codes), joined, bits), given, stored)
