"""The default quantizer: clip search with a least-squares refit, judged by the error of what is stored.

Ranges clipped to several ratios are refitted by least squares and rounded to the format's grids; then the grids around
the best candidate are searched, because the error jumps as weights change codes: the stored optimum lies beside the
rounded optimum. Round to nearest is among the candidates, so no block is ever worse than that.

Least squares leaves a matrix smaller than it was: what is stored is nearly a projection. Products of three such matrices,
as experts are, shrink three times, and that error does not average out. The base is therefore scaled at the end so that
the stored matrix has the norm of the given one, which costs a quarter of the shrinkage in weight error.
"""

import torch

from foregate.quantize.blockwise import BlockQuantizer
from foregate.quantize.fit import best_zero, clipped_range, full_range, least_squares, squared_error
from foregate.quantize.grid import Choice, Grid

REFITS = 2  # least-squares steps from each clipped range
WIDE_RATIOS = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6)  # clipped ranges tried for groups of 64
NARROW_RATIOS = (1.0, 0.87, 0.74, 0.61)  # and for groups of 16


class Refit(BlockQuantizer):
    """Least (weighted) squared error of the stored weights, without calibration or with an importance per column."""

    name = "refit"
    uses_inputs = True
    keeps_norm = True

    def choose(self, grid: Grid, w: torch.Tensor, h: torch.Tensor) -> Choice:
        search = _Search(grid, w, h)
        search.consider(grid.snap(*full_range(w, grid.least, grid.layout.top)))
        if grid.layout.groups == 1:
            search.wide()
        else:
            search.grouped()
        return search.best


class _Search:
    """The best choice so far for each block, and the moves that look for better ones."""

    def __init__(self, grid: Grid, w: torch.Tensor, h: torch.Tensor) -> None:
        self.grid, self.w, self.h = grid, w, h
        self.best: Choice | None = None

    def consider(self, trial: Choice) -> None:
        """Keep `trial` in the blocks where it has the least error so far."""
        error = self.error(*self.grid.restore(trial)).sum(1, keepdim=True)
        if self.best is None:
            self.best, self._error = trial, error
        else:
            better = error < self._error
            self.best.keep_better(better, trial)
            self._error = torch.where(better, error, self._error)

    def error(self, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Squared error [blocks, groups]."""
        return squared_error(self.w, self.h, scale, zero, self.grid.layout.top)

    def fitted(self, ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The range clipped to `ratio`, refitted."""
        least, top = self.grid.least, self.grid.layout.top
        scale, zero = clipped_range(self.w, ratio, least, top)
        for _ in range(REFITS):
            scale, zero = least_squares(self.w, self.h, scale, zero, least, top)
        return scale, zero

    def refitted_zero(self, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """The zero point to store with `scale`, starting from the one that gives `offset` = scale * zero."""
        top = self.grid.layout.top
        return self.grid.stored_zero(best_zero(self.w, self.h, scale, (offset / scale).clamp(max=top), top))

    def wide(self) -> None:
        """Blocks of one group: fits of all ratios, then scales and zero points around the best."""
        grid, top = self.grid, self.grid.layout.zero_top
        for ratio in WIDE_RATIOS:
            self.consider(grid.snap(*self.fitted(ratio)))
        centre = Choice(self.best.index, self.best.factor, self.best.zero)
        offset = grid.block_scale(centre.index) * centre.zero
        for step in (-1, 0, 1):
            index = (centre.index + step).clamp(0, 255)
            zero = (offset / grid.block_scale(index)).round()
            for shift in (-4, -2, 0, 2, 4):
                self.consider(Choice(index, centre.factor, (zero + shift).clamp(0, top)))
        centre = Choice(self.best.index, self.best.factor, self.best.zero)
        scale, zero = grid.restore(centre)
        for step in (-1, 0, 1):
            index = (centre.index + step).clamp(0, 255)
            self.consider(Choice(index, centre.factor, self.refitted_zero(grid.block_scale(index), scale * zero)))

    def grouped(self) -> None:
        """Blocks of several groups: scales around the greatest ideal one, each with the groups' best answers to it."""
        grid = self.grid
        scale, zero = self.fitted(NARROW_RATIOS[0])
        least_error = self.error(scale, zero)
        for ratio in NARROW_RATIOS[1:]:
            other_scale, other_zero = self.fitted(ratio)
            error = self.error(other_scale, other_zero)
            better = error < least_error
            least_error = torch.where(better, error, least_error)
            scale, zero = torch.where(better, other_scale, scale), torch.where(better, other_zero, zero)
        centre = grid.snap(scale, zero).index
        for step in (1, -1, -3, -5):
            index = (centre + step).clamp(0, 255)
            self.consider(self._answer(index, scale, scale * zero))

    def _answer(self, index: torch.Tensor, ideal: torch.Tensor, offset: torch.Tensor) -> Choice:
        """For the block scales `index`: each group's best multiplier and zero point beside its ideal."""
        grid = self.grid
        nearest = grid.stored_factor(ideal, grid.block_scale(index))
        best_factor, best = nearest, torch.zeros_like(nearest)
        least_error = torch.full_like(nearest, torch.inf)
        for more in (-1, 0, 1):
            factor = (nearest + more).clamp(1, 16)
            scale, _ = grid.restore(Choice(index, factor, best))
            middle = self.refitted_zero(scale, offset)
            for shift in (-1, 0, 1):
                stored = (middle + shift).clamp(0, grid.layout.zero_top)
                error = self.error(*grid.restore(Choice(index, factor, stored)))
                better = error < least_error
                least_error = torch.where(better, error, least_error)
                best_factor, best = torch.where(better, factor, best_factor), torch.where(better, stored, best)
        return Choice(index, best_factor, best)
