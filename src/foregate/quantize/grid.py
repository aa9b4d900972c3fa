"""What the format can store for a block: scales, multipliers and zero points on their grids (PyTorch).

A block is [groups, size] weights: one group of 64, or at 2 bits four groups of 16. Grids are float32 tensors of whole
numbers, which makes them easy to search; `planes` turns them into bytes.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from foregate.quantize.matrix import BLOCK, GROUP, SCALE_STEPS, pack_codes, scale_table


@dataclass(frozen=True)
class Layout:
    """What differs between the bits."""

    bits: int
    groups: int  # per block
    zero_top: int  # stored zero points are 0..zero_top
    zero_step: float  # what one of them means, in codes

    @staticmethod
    def of(bits: int) -> "Layout":
        top = 2**bits - 1
        return Layout(2, BLOCK // GROUP, 15, 1 / 5) if bits == 2 else Layout(bits, 1, 255, top / 255)

    @property
    def top(self) -> int:
        """The greatest code."""
        return 2**self.bits - 1

    @property
    def size(self) -> int:
        """Weights per group."""
        return BLOCK // self.groups


@dataclass
class Choice:
    """What is stored for each block."""

    index: torch.Tensor  # [blocks, 1] of the scale, 0..255
    factor: torch.Tensor  # [blocks, groups] multiplier of the scale, 1..16 sixteenths; 16 where the format has none
    zero: torch.Tensor  # [blocks, groups] 0..zero_top

    def keep_better(self, better: torch.Tensor, other: "Choice") -> None:
        """Take over `other` in the blocks where `better`, bool [blocks, 1], says so."""
        self.index = torch.where(better, other.index, self.index)
        self.factor = torch.where(better, other.factor, self.factor)
        self.zero = torch.where(better, other.zero, self.zero)


class Grid:
    """The scales and zero points that a matrix with a given base (> 0) can have."""

    def __init__(self, bits: int, base: float) -> None:
        self.layout = Layout.of(bits)
        self.base = base
        self._table = scale_table()

    @property
    def least(self) -> float:
        """The least scale of a group."""
        return self.base * float(self._table[-1]) / (16 if self.layout.groups > 1 else 1)

    def block_scale(self, index: torch.Tensor) -> torch.Tensor:
        """The scale of a block by its index."""
        return self.base * self._table[index.long()]

    def index_of(self, scale: torch.Tensor) -> torch.Tensor:
        """The index of the nearest scale of a block, by ratio."""
        return (SCALE_STEPS * torch.log2(self.base / scale)).clamp(0, 255).round()

    def stored_zero(self, zero: torch.Tensor) -> torch.Tensor:
        """The nearest zero point, from one in codes."""
        return (zero / self.layout.zero_step).clamp(0, self.layout.zero_top).round()

    def stored_factor(self, scale: torch.Tensor, block_scale: torch.Tensor) -> torch.Tensor:
        """The nearest multiplier that makes `scale` from `block_scale`."""
        if self.layout.groups == 1:
            return torch.full_like(scale, 16)
        return (16 * scale / block_scale).clamp(1, 16).round()

    def snap(self, scale: torch.Tensor, zero: torch.Tensor) -> Choice:
        """The nearest choice to scales and zero points [blocks, groups]; the block's scale is the greatest of them."""
        index = self.index_of(scale.amax(1, keepdim=True))
        return Choice(index, self.stored_factor(scale, self.block_scale(index)), self.stored_zero(zero))

    def restore(self, choice: Choice) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zero points [blocks, groups] that a choice means."""
        return self.block_scale(choice.index) * (choice.factor / 16), choice.zero * self.layout.zero_step


def blocks_of(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, cols] as blocks [rows * blocks per row, groups, size], padded with zeros."""
    layout = Layout.of(bits)
    return functional.pad(rows, (0, -rows.shape[-1] % BLOCK)).reshape(-1, layout.groups, layout.size)


def greatest_scale(weight: torch.Tensor, bits: int) -> float:
    """The base of a matrix: the scale that takes the widest group's full range, zero included, to the codes."""
    blocks = blocks_of(weight, bits)
    width = blocks.amax(-1).clamp(min=0) - blocks.amin(-1).clamp(max=0)
    return float(width.max() / Layout.of(bits).top)


def codes_of(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int) -> torch.Tensor:
    """Codes, as floats [blocks, groups, size], of weights of that shape; scale, zero: [blocks, groups]."""
    return (w * (1 / scale).unsqueeze(-1) + zero.unsqueeze(-1)).clamp(0, top).round()


def scales_and_zeros(planes: dict[str, torch.Tensor], bits: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and the zero point of every weight, float32 [rows, cols], as the planes give them."""
    grid = Grid(bits, float(planes["base"]))
    rows, blocks = planes["scales"].shape
    index = planes["scales"].reshape(-1, 1).float()
    if bits == 2:
        stored = planes["groups"].reshape(-1, grid.layout.groups)
        choice = Choice(index, ((stored & 15) + 1).float(), (stored >> 4).float())
    else:
        choice = Choice(index, torch.full_like(index, 16), planes["zeros"].reshape(-1, 1).float())
    scale, zero = (
        x.repeat_interleave(grid.layout.size, 1).reshape(rows, blocks * BLOCK)[:, :cols] for x in grid.restore(choice)
    )
    return scale, zero


def grid_planes(choice: Choice, bits: int, rows: int) -> dict[str, torch.Tensor]:
    """The planes "scales" and "zeros" or "groups" of a choice for all blocks of `rows` rows."""
    scales = choice.index.reshape(rows, -1).to(torch.uint8)
    if bits == 2:
        stored = choice.zero.to(torch.uint8) << 4 | (choice.factor.to(torch.uint8) - 1)
        return {"scales": scales, "groups": stored.reshape(rows, -1, BLOCK // GROUP)}
    return {"scales": scales, "zeros": choice.zero.reshape(rows, -1).to(torch.uint8)}


def planes_of(base: float, codes: torch.Tensor, grids: dict[str, torch.Tensor], bits: int) -> dict[str, torch.Tensor]:
    """All planes in the record's order, from codes [rows, cols] and the planes of `grid_planes`."""
    return {"base": torch.tensor([base], dtype=torch.float32), **pack_codes(codes.to(torch.uint8), bits), **grids}
