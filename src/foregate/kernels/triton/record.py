"""Where the planes of an expert's two matrices lie in a record, as constants that kernels are compiled for."""

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from foregate.checkpoint.store import RecordLayout
from foregate.checkpoint.tensors import DTYPES
from foregate.quantize.matrix import PLANES

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True)
class MatrixPlace:
    """A quantized matrix [rows, cols] in a record: byte offsets of its planes (-1: there is none) and of its bias."""

    bits: int
    rows: int
    cols: int
    low: int
    high: int
    scales: int
    zeros: int  # the plane "groups" at 2 bits
    base: int
    bias: int
    bias_type: tl.dtype

    @property
    def parts(self) -> int:
        """Codes in a byte of the plane "low"; a block's columns are as many runs."""
        return {8: 1, 4: 2, 3: 4, 2: 4}[self.bits]

    def constants(self) -> dict[str, Any]:
        """The arguments by which kernels know the matrix."""
        names = ("bits", "parts", "cols", "low", "high", "scales", "zeros", "base", "bias", "bias_type")
        return {name.upper(): getattr(self, name) for name in names}


@dataclass(frozen=True)
class RecordPlaces:
    """Both matrices of an expert. up: [inner, hidden], with a gate [2 * inner, hidden]; down: [hidden, inner]."""

    up: MatrixPlace
    down: MatrixPlace


def record_places(layout: RecordLayout) -> RecordPlaces | str:
    """Where the matrices of these records lie, or why no Triton kernel reads them."""
    params = {param.name: param for param in layout.params}
    first = "gate_up_proj" if "gate_up_proj" in params else "up_proj"
    known = {first, "down_proj", f"{first}_bias", "down_proj_bias"}
    if not {first, "down_proj"} <= params.keys() <= known:
        return f"the Triton kernels know no experts with parameters {', '.join(params)}"
    plain = [name for name in (first, "down_proj") if params[name].bits not in PLANES]
    if plain:
        return f"the Triton kernels read 8, 4, 3 and 2 bits, {plain[0]} has {params[plain[0]].bits}"
    return RecordPlaces(_place(layout, first), _place(layout, "down_proj"))


def _place(layout: RecordLayout, name: str) -> MatrixPlace:
    param = next(param for param in layout.params if param.name == name)
    tensors = {spec.name: spec for spec in layout.tensors}

    def offset(plane: str) -> int:
        return tensors[f"{name}.{plane}"].offset if plane in PLANES[param.bits] else -1

    bias = tensors.get(f"{name}_bias")
    return MatrixPlace(
        bits=param.bits,
        rows=param.shape[0],
        cols=param.shape[1],
        low=offset("low"),
        high=offset("high"),
        scales=offset("scales"),
        zeros=offset("groups" if param.bits == 2 else "zeros"),
        base=offset("base"),
        bias=-1 if bias is None else bias.offset,
        bias_type=tl.float32 if bias is None else _TYPES[DTYPES[bias.dtype]],
    )
