"""Safetensors files as byte ranges: headers are read and checked, tensors are read on demand by `pread`.

Memory maps would count every page they touch as resident; plain reads keep conversion's memory at what is in use.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from foregate.errors import ForegateError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
COPY_BYTES = 8 << 20


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: absolute byte range [start, end) of a file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def read(self) -> torch.Tensor:
        """The whole tensor, in its own dtype."""
        return self._read(self.start, self.nbytes, self.shape)

    def read_row(self, row: int) -> torch.Tensor:
        """Row `row` of the first dimension, which is kept: shape [1, ...]."""
        row_bytes = self.nbytes // self.shape[0]
        return self._read(self.start + row * row_bytes, row_bytes, (1, *self.shape[1:]))

    def chunks(self) -> Iterator[bytes]:
        """The tensor's bytes in pieces of bounded size."""
        with self.path.open("rb") as stream:
            stream.seek(self.start)
            left = self.nbytes
            while left:
                piece = stream.read(min(left, COPY_BYTES))
                if not piece:
                    raise ForegateError(f"{self.path} ended while tensor {self.name} was read: copy the file again")
                left -= len(piece)
                yield piece

    def _read(self, start: int, nbytes: int, shape: tuple[int, ...]) -> torch.Tensor:
        buffer = bytearray(nbytes)
        view, done = memoryview(buffer), 0
        with self.path.open("rb", buffering=0) as stream:
            stream.seek(start)
            while done < nbytes:
                count = stream.readinto(view[done:])
                if not count:
                    raise ForegateError(f"{self.path} ended while tensor {self.name} was read: copy the file again")
                done += count
        if not nbytes:
            return torch.empty(shape, dtype=DTYPES[self.dtype])
        return torch.frombuffer(buffer, dtype=DTYPES[self.dtype]).reshape(shape)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """All tensors of a safetensors file, after checking that the file is as long as its header says.

    Raises ForegateError when the file is not safetensors or is cut short.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise ValueError
            header = json.loads(stream.read(length))
        entries = {
            name: _entry(path, name, spec, 8 + length) for name, spec in header.items() if name != "__metadata__"
        }
    except FileNotFoundError:
        raise ForegateError(f"{path} is missing: copy the whole folder again") from None
    except OSError as error:
        raise ForegateError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ForegateError(f"{path} is not a whole safetensors file (bad header): copy or download it again") from None
    end = max((entry.end for entry in entries.values()), default=8 + length)
    if end != size:
        raise ForegateError(
            f"{path} is truncated or damaged: {size:,} bytes where its header says {end:,}; copy or download it again"
        )
    return entries


def _entry(path: Path, name: str, spec: dict, base: int) -> TensorEntry:
    begin, end = spec["data_offsets"]
    shape = tuple(int(n) for n in spec["shape"])
    if spec["dtype"] not in DTYPES:
        raise ForegateError(f"{path}: tensor {name} has dtype {spec['dtype']}, which Foregate does not read")
    if begin < 0 or end - begin != prod(shape) * DTYPES[spec["dtype"]].itemsize:
        raise ValueError(name)
    return TensorEntry(path, name, spec["dtype"], shape, base + begin, base + end)


def build_header(tensors: dict[str, tuple[str, tuple[int, ...], int]], align: int = 8) -> bytes:
    """Length word and JSON header of a safetensors file, padded with spaces so that the data starts `align`-ed.

    `tensors` maps names to (dtype, shape, bytes), in file order; the data must follow without holes.
    """
    offset, header = 0, {"__metadata__": {"format": "pt"}}  # transformers asks for the format
    for name, (dtype, shape, nbytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % align)
    return len(text).to_bytes(8, "little") + text


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`; a short write goes on where it stopped."""
    view = memoryview(data).cast("B")
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count
