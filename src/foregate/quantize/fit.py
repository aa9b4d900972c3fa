"""Fitting a scale and a zero point to groups of weights (PyTorch): the steps that quantizers are made of.

Weights w and importances h are [blocks, groups, size], everything else [blocks, groups]; a weight is stored as
scale * (q - zero) with q in 0..top. The native library has the same functions in quantize_fit.hpp.
"""

import torch

from foregate.quantize.grid import codes_of


def full_range(w: torch.Tensor, least: float, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point that take the least and the greatest weight to the codes 0 and top.

    Zero counts as a weight, because the format's zero points lie in 0..top.
    """
    return clipped_range(w, 1.0, least, top)


def clipped_range(w: torch.Tensor, ratio: float, least: float, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for the range shrunk around its centre to `ratio` of its width: the outermost weights are clipped."""
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    centre = (low + high) / 2
    scale = ((high - low) * (ratio / top)).clamp(min=least)
    return scale, (-(centre + (low - centre) * ratio) / scale).clamp(0, top)


def squared_error(w: torch.Tensor, h: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int) -> torch.Tensor:
    """The sum of h * error**2 per group, for the nearest codes."""
    q = codes_of(w, scale, zero, top)
    return (h * (w - (q - zero.unsqueeze(-1)) * scale.unsqueeze(-1)) ** 2).sum(-1)


def least_squares(
    w: torch.Tensor, h: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, least: float, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of least error for the codes that the given ones yield: linear regression of w on q.

    A group whose codes are all equal, or whose scale would fall below `least`, keeps what it has.
    """
    q = codes_of(w, scale, zero, top)
    sum_h = h.sum(-1).clamp(min=1e-20)
    sum_hq, sum_hqq, sum_hqw, sum_hw = (h * q).sum(-1), (h * q * q).sum(-1), (h * q * w).sum(-1), (h * w).sum(-1)
    spread = sum_h * sum_hqq - sum_hq**2
    fitted = (sum_h * sum_hqw - sum_hq * sum_hw) / spread
    offset = (fitted * sum_hq - sum_hw) / (sum_h * fitted)
    use = (spread > 1e-6 * sum_h**2) & (fitted > least)
    return torch.where(use, fitted, scale), torch.where(use, offset.clamp(0, top), zero)


def best_zero(w: torch.Tensor, h: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int) -> torch.Tensor:
    """The zero point of least error for the given scale and the codes that scale and zero yield."""
    q = codes_of(w, scale, zero, top)
    return ((h * (q - w / scale.unsqueeze(-1))).sum(-1) / h.sum(-1).clamp(min=1e-20)).clamp(0, top)
