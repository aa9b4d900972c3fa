"""Quantized matrices: their planes and how the planes encode the weights.

A matrix W [rows, cols] is cut into blocks of 64 consecutive columns. Every weight is a code q of 2, 3, 4 or 8 bits; a
block has one scale and one zero point (2 bits: four groups of 16 columns with a multiplier and a zero point each) and
means w = scale * (q - zero). Codes, scales and zero points lie in separate planes, so that a kernel reads each as one
stream. Everything here is written to be obvious; `foregate.kernels.cpu` is written to be fast.
"""

import math
from dataclasses import dataclass

import torch

BITS = (2, 3, 4, 8)
BLOCK = 64  # columns that share a scale
GROUP = 16  # columns that share a multiplier and a zero point, at 2 bits
SCALE_STEPS = 16  # scale indices per factor of two

# Planes by bits, in the order in which a record holds them.
PLANES: dict[int, tuple[str, ...]] = {
    2: ("base", "low", "scales", "groups"),
    3: ("base", "low", "high", "scales", "zeros"),
    4: ("base", "low", "scales", "zeros"),
    8: ("base", "low", "scales", "zeros"),
}

_LOW_BYTES = {2: 16, 3: 16, 4: 32, 8: 64}  # of the plane "low", per block


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix of `rows` outputs by `cols` inputs, held as planes (see `plane_shapes`)."""

    bits: int
    rows: int
    cols: int
    planes: dict[str, torch.Tensor]

    @classmethod
    def outline(cls, bits: int, rows: int, cols: int) -> "QuantizedMatrix":
        """A matrix whose planes have shapes and no content. Raises ValueError when there is no such matrix."""
        shapes = plane_shapes(bits, rows, cols)
        planes = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in shapes.items()}
        return cls(bits, rows, cols, planes)

    def dequantize(self) -> torch.Tensor:
        """The weights, float32 [rows, cols]."""
        return dequantize(self.planes, self.bits, self.rows, self.cols)


def plane_shapes(bits: int, rows: int, cols: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every plane of a matrix, in the order in which a record holds them.

    Raises ValueError when no such matrix exists.
    """
    if bits not in BITS:
        raise ValueError(f"a quantized matrix has {', '.join(map(str, BITS))} bits, not {bits}")
    if rows < 1 or cols < 1:
        raise ValueError(f"a quantized matrix has rows and columns, not {rows} x {cols}")
    blocks = math.ceil(cols / BLOCK)
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "base": (torch.float32, (1,)),
        "low": (torch.uint8, (rows, blocks, _LOW_BYTES[bits])),
        "high": (torch.uint8, (rows, blocks, 8)),
        "scales": (torch.uint8, (rows, blocks)),
        "zeros": (torch.uint8, (rows, blocks)),
        "groups": (torch.uint8, (rows, blocks, BLOCK // GROUP)),
    }
    return {name: shapes[name] for name in PLANES[bits]}


def pack_codes(codes: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """The planes "low" and, at 3 bits, "high" that hold codes, uint8 [rows, cols] with values below 2**bits.

    The ragged last block is padded with code 0.
    """
    rows, cols = codes.shape
    blocks = math.ceil(cols / BLOCK)
    q = torch.zeros(rows, blocks * BLOCK, dtype=torch.uint8)
    q[:, :cols] = codes
    q = q.view(rows, blocks, BLOCK)
    if bits == 8:
        return {"low": q}
    if bits == 4:
        return {"low": _interleave(q, 4)}
    low = {"low": _interleave(q & 3, 2)}
    if bits == 3:
        low["high"] = _interleave((q >> 2).view(rows, blocks, 8, 8).transpose(2, 3).reshape(rows, blocks, BLOCK), 1)
    return low


def unpack_codes(planes: dict[str, torch.Tensor], bits: int, cols: int) -> torch.Tensor:
    """The codes, uint8 [rows, cols]: the inverse of `pack_codes`."""
    low = planes["low"]
    rows, blocks = low.shape[:2]
    if bits == 8:
        q = low
    elif bits == 4:
        q = _separate(low, 4)
    else:
        q = _separate(low, 2)
    if bits == 3:
        q = q | _separate(planes["high"], 1).view(rows, blocks, 8, 8).transpose(2, 3).reshape(rows, blocks, BLOCK) << 2
    return q.reshape(rows, blocks * BLOCK)[:, :cols]


def scale_table() -> torch.Tensor:
    """Block scales relative to the matrix's base, by index: float32 [256], T[i] = 2 ** (-i / 16)."""
    return torch.tensor([2.0 ** (-i / SCALE_STEPS) for i in range(256)], dtype=torch.float64).float()


def dequantize(planes: dict[str, torch.Tensor], bits: int, rows: int, cols: int) -> torch.Tensor:
    """The weights of a matrix, float32 [rows, cols], step by step as the format defines them."""
    q = unpack_codes(planes, bits, math.ceil(cols / BLOCK) * BLOCK).view(rows, -1, BLOCK).float()
    table = scale_table().to(planes["scales"].device)
    scale = (planes["base"] * table[planes["scales"].long()]).unsqueeze(-1)  # [rows, blocks, 1]
    if bits == 2:
        groups = planes["groups"].repeat_interleave(GROUP, dim=-1)  # a byte per column
        scale = scale * ((groups & 15) + 1).float() / 16
        zero = (groups >> 4).float() / 5
    else:
        zero = planes["zeros"].float().unsqueeze(-1) * torch.tensor((2**bits - 1) / 255, dtype=torch.float32)
    return (scale * (q - zero)).reshape(rows, -1)[:, :cols]


def _interleave(q: torch.Tensor, width: int) -> torch.Tensor:
    """Bytes [..., 64 * width / 8] from values [..., 64] of `width` bits: byte j holds values j, j + n, j + 2n, ..."""
    parts = q.unflatten(-1, (8 // width, -1))
    packed = torch.zeros_like(parts[..., 0, :])
    for i in range(8 // width):
        packed |= parts[..., i, :] << (i * width)
    return packed


def _separate(packed: torch.Tensor, width: int) -> torch.Tensor:
    """The inverse of `_interleave`."""
    return torch.cat([(packed >> (i * width)) & (2**width - 1) for i in range(8 // width)], dim=-1)
