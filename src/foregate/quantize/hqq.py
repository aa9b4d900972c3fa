"""Half-quadratic quantization (HQQ): a zero point per group that resists outliers.

Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023,
https://mobiusml.github.io/hqq_blog/. The scale stays that of the full range; the zero point minimizes sum |error|**p
with p < 1 by half-quadratic splitting: a shrinkage of the errors, then a mean, with a growing penalty beta.
"""

import torch

from foregate.quantize.blockwise import BlockQuantizer
from foregate.quantize.fit import full_range
from foregate.quantize.grid import Choice, Grid, codes_of

ITERATIONS = 20
NORM = 0.7  # p
BETA = 10.0
BETA_GROWTH = 1.01


def solve(w: torch.Tensor, least: float, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point [blocks, groups] of the weights w [blocks, groups, size], before they are stored.

    Always all iterations: the library stops when the mean |error| of the whole matrix no longer falls, which is later
    than the zero points settle.
    """
    scale, zero = full_range(w, least, top)
    inverse = (1 / scale).unsqueeze(-1)
    for i in range(ITERATIONS):
        q = codes_of(w, scale, zero, top)
        error = w - (q - zero.unsqueeze(-1)) * scale.unsqueeze(-1)
        size = error.abs()
        beta = BETA * BETA_GROWTH**i
        shrunk = error.sign() * (size - size.clamp(min=1e-30) ** (NORM - 1) / beta).clamp(min=0)
        zero = (q - (w - shrunk) * inverse).mean(-1)
    return scale, zero.clamp(0, top)


class Hqq(BlockQuantizer):
    """HQQ without calibration. Its scales and zero points are found first and rounded to the format's afterwards."""

    name = "hqq"

    def choose(self, grid: Grid, w: torch.Tensor, h: torch.Tensor) -> Choice:
        return grid.snap(*solve(w, grid.least, grid.layout.top))
