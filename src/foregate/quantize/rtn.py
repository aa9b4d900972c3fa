"""Round to nearest: the full range of every group, every weight to the nearest code."""

import torch

from foregate.quantize.blockwise import BlockQuantizer
from foregate.quantize.fit import full_range
from foregate.quantize.grid import Choice, Grid


class Rtn(BlockQuantizer):
    """The baseline that every other quantizer has to beat."""

    name = "rtn"

    def choose(self, grid: Grid, w: torch.Tensor, h: torch.Tensor) -> Choice:
        return grid.snap(*full_range(w, grid.least, grid.layout.top))
