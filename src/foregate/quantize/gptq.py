"""GPTQ: quantization that counts errors by the inputs a matrix really sees, and lets later columns make up for them.

Source: Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2023, https://arxiv.org/abs/2210.17323. Columns are rounded one after another; the error of each is
spread over the columns to come so that the output changes least, as the inverse of H = X^T X says. The grids of each
block of 64 columns are `Refit`'s, chosen when the block's turn comes, for the weights as they have become by then.
"""

import torch

from foregate.errors import ForegateError
from foregate.quantize.base import Problem, Quantizer, prepare
from foregate.quantize.grid import greatest_scale, planes_of, scales_and_zeros
from foregate.quantize.matrix import BLOCK, QuantizedMatrix
from foregate.quantize.refit import Refit

DAMPING = 0.01  # of the mean diagonal of H, added to its diagonal
SHRINKAGE = 0.5  # off-diagonal prior, in samples per column; see `_inverse_factor`
PRIOR_SAMPLES = 4  # diagonal prior, in samples


class Gptq(Quantizer):
    """Calibrated. Without a Hessian it is `Refit` with the importance; the fewer samples, the nearer it is to that."""

    name = "gptq"
    uses_inputs = True
    needs_inputs = True

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
        if hessian is None or not hessian.diagonal().any():
            return Refit().quantize(weight, bits, importance, name=name)
        problem = prepare(weight, bits, None, name)
        factor = _inverse_factor(hessian, problem.weight.shape[1], samples, name)
        return problem.finish(_planes(problem, factor))


def _inverse_factor(hessian: torch.Tensor, cols: int, samples: int | None, name: str) -> torch.Tensor:
    """The upper Cholesky factor U of the inverse of the damped Hessian, H^-1 = U^T U: float32 [cols, cols].

    Few samples tell the mean squares of columns well and their correlations badly, so that feedback along them would
    fit noise. The off-diagonal part is therefore shrunk by samples / (samples + SHRINKAGE * cols), and the diagonal is
    mixed with its mean as if PRIOR_SAMPLES more samples had had that.
    """
    if hessian.shape != (cols, cols):
        raise ValueError(f"{name} has {cols} columns, its Hessian has the shape {tuple(hessian.shape)}")
    hessian = hessian.detach().to("cpu", torch.float64)
    if not torch.isfinite(hessian).all():
        raise ForegateError(f"the Hessian of {name} has values that are NaN or infinite")
    hessian = hessian / hessian.diagonal().mean()
    diagonal = hessian.diagonal().clone()
    if samples is not None:
        diagonal = (samples * diagonal + PRIOR_SAMPLES) / (samples + PRIOR_SAMPLES)
        hessian *= samples / (samples + SHRINKAGE * cols)
    diagonal += DAMPING
    hessian.diagonal().copy_(diagonal)
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if not failed:
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
    if failed:
        raise ForegateError(f"the Hessian of {name} is not positive semidefinite")
    return factor.float()


def _planes(problem: Problem, factor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The planes of the problem's weight, given the factor U of `_inverse_factor`."""
    bits, top = problem.bits, 2**problem.bits - 1
    refit, base = Refit(), greatest_scale(problem.weight, bits)
    if base == 0:
        return refit.stored(problem, base).planes
    columns = problem.weight.T.contiguous()  # [cols, rows]: a column at a time is worked on
    loss = factor.diagonal() ** -2  # of a column's squared error, when later columns make up for it
    codes = torch.empty_like(columns)
    grids = []
    for start in range(0, len(columns), BLOCK):
        part = slice(start, min(start + BLOCK, len(columns)))
        block, feedback = columns[part], factor[part, part]
        importance = loss[part] / loss[part].mean()
        planes = refit.stored(Problem(block.T.contiguous(), 0, bits, importance), base).planes
        grids.append({plane: planes[plane] for plane in ("scales", "groups" if bits == 2 else "zeros")})
        scale, zero = (x.T.contiguous() for x in scales_and_zeros(planes, bits, len(block)))
        errors = torch.empty_like(block)
        for j in range(len(block)):
            q = codes[start + j] = (block[j] / scale[j] + zero[j]).clamp(0, top).round()
            errors[j] = (block[j] - scale[j] * (q - zero[j])) / feedback[j, j]
            block[j + 1 :].addr_(feedback[j, j + 1 :], errors[j], alpha=-1)
        columns[part.stop :].addmm_(factor[part, part.stop :].T, errors, alpha=-1)
    joined = {plane: torch.cat([grid[plane] for grid in grids], dim=1) for plane in grids[0]}
    return planes_of(base, codes.T, joined, bits)
