"""The store: a converted model on disk, one record per expert (docs/store.md describes the format).

A store is a folder that stays a normal model folder: `config.json`, tokenizer, `model.safetensors` with the backbone
only. Beside them `experts.safetensors` holds one U8 tensor per expert: its record, padded to 4096 bytes and starting
at a multiple of 4096, so that one direct read moves one expert; `foregate.json` describes records and checksums. With a
quantized backbone the matrices of its linear modules lie in `matrices.safetensors`.
"""

import json
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch

from foregate.checkpoint.source import STORE_MANIFEST
from foregate.checkpoint.tensors import DTYPE_NAMES, DTYPES, build_header, read_header
from foregate.errors import ForegateError
from foregate.quantize.matrix import PLANES, QuantizedMatrix, plane_shapes

FORMAT_VERSION = 2  # 1: every backbone is in the checkpoint's own precision
UNQUANTIZED = 16  # "bits" of weights in the checkpoint's own precision
ALIGNMENT = 4096  # of records: the unit of direct I/O
TENSOR_ALIGNMENT = 64  # of the tensors in a record
BACKBONE_FILE = "model.safetensors"
EXPERTS_FILE = "experts.safetensors"
MATRICES_FILE = "matrices.safetensors"

ExpertKey = tuple[int, int]  # (index of the MoE layer, index of the expert in it)


Weight = torch.Tensor | QuantizedMatrix  # one parameter of an expert, as a record holds it


@dataclass(frozen=True)
class TensorSpec:
    """One tensor inside a record: a whole parameter, or one plane of a quantized matrix ("down_proj.scales")."""

    name: str
    dtype: str  # safetensors' names: BF16, F16, F32, U8 ...
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the record

    @property
    def nbytes(self) -> int:
        return DTYPES[self.dtype].itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class ParamSpec:
    """One parameter of an expert: its true shape ([out, in] or [out]) and the bits its weights are held in."""

    name: str
    shape: tuple[int, ...]
    bits: int  # 2, 3, 4, 8: planes of a quantized matrix; otherwise the checkpoint's own 16 or 32


@dataclass(frozen=True)
class RecordLayout:
    """How the bytes of one expert are laid out: tensors one after another, each 64-aligned, padded to 4096 at the end."""

    params: tuple[ParamSpec, ...]
    tensors: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, weights: dict[str, Weight]) -> "RecordLayout":
        """The layout that holds these parameters, in this order."""
        params, tensors, offset = [], [], 0
        for name, weight in weights.items():
            if isinstance(weight, QuantizedMatrix):
                params.append(ParamSpec(name, (weight.rows, weight.cols), weight.bits))
            else:
                params.append(ParamSpec(name, tuple(weight.shape), 8 * weight.element_size()))
            for tensor_name, tensor in _tensors(name, weight).items():
                spec = TensorSpec(tensor_name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), offset)
                tensors.append(spec)
                offset = _round_up(offset + spec.nbytes, TENSOR_ALIGNMENT)
        return cls(tuple(params), tuple(tensors))

    @classmethod
    def at(cls, bits: int, params: dict[str, torch.Tensor]) -> "RecordLayout":
        """The layout of experts with such parameters: matrices quantized to `bits`, all else as it is; 16 keeps all."""
        return cls.of(
            {
                name: param if keeps(param, bits) else QuantizedMatrix.outline(bits, *param.shape)
                for name, param in params.items()
            }
        )

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the record, padding included."""
        return _round_up(self.packed_bytes, ALIGNMENT)

    @cached_property
    def packed_bytes(self) -> int:
        """Bytes of the record up to its last tensor, a multiple of 64."""
        return _round_up(max(spec.offset + spec.nbytes for spec in self.tensors), TENSOR_ALIGNMENT)

    def pack(self, weights: dict[str, Weight]) -> bytearray:
        """The record of an expert. Raises ForegateError when its parameters do not match the layout."""
        record = bytearray(self.nbytes)
        view = torch.frombuffer(record, dtype=torch.uint8)
        tensors = {key: tensor for name, weight in weights.items() for key, tensor in _tensors(name, weight).items()}
        for spec in self.tensors:
            tensor = tensors[spec.name]
            if tuple(tensor.shape) != spec.shape or tensor.dtype != DTYPES[spec.dtype]:
                raise ForegateError(
                    f"expert tensor {spec.name} is {tensor.dtype} {tuple(tensor.shape)} where the layer's first expert "
                    f"has {spec.dtype} {spec.shape}: experts of one layer must be alike"
                )
            view[spec.offset : spec.offset + spec.nbytes] = tensor.reshape(-1).view(torch.uint8)
        return record

    def unpack(self, record: torch.Tensor) -> dict[str, Weight]:
        """The parameters in `record` (uint8 [nbytes]) as views; nothing is copied."""
        tensors = {
            spec.name: record[spec.offset : spec.offset + spec.nbytes].view(DTYPES[spec.dtype]).view(spec.shape)
            for spec in self.tensors
        }
        weights: dict[str, Weight] = {}
        for param in self.params:
            if param.bits in PLANES:
                planes = {plane: tensors[f"{param.name}.{plane}"] for plane in PLANES[param.bits]}
                weights[param.name] = QuantizedMatrix(param.bits, *param.shape, planes)
            else:
                weights[param.name] = tensors[param.name]
        return weights


def keeps(param: torch.Tensor, bits: int) -> bool:
    """Whether a parameter of an expert stays as it is in records of `bits`: biases do, matrices unless at 16."""
    return bits == UNQUANTIZED or param.dim() != 2


def _tensors(name: str, weight: Weight) -> dict[str, torch.Tensor]:
    """The tensors that hold a parameter, by their names in the record."""
    if isinstance(weight, QuantizedMatrix):
        return {f"{name}.{plane}": weight.planes[plane] for plane in PLANES[weight.bits]}
    return {name: weight}


@dataclass(frozen=True)
class LayerInfo:
    """One MoE layer of the store."""

    module: str  # path of its experts module in the transformers model
    num_experts: int
    top_k: int
    layout: RecordLayout


@dataclass(frozen=True)
class MatrixInfo:
    """The weight of one linear module of a quantized backbone."""

    module: str  # path in the transformers model
    shape: tuple[int, int]  # [out, in]
    bits: int

    @cached_property
    def layout(self) -> RecordLayout:
        """Its record: the planes of the one parameter "weight"."""
        return RecordLayout.of({"weight": QuantizedMatrix.outline(self.bits, *self.shape)})

    @property
    def nbytes(self) -> int:
        """Bytes of its record, a multiple of 64."""
        return self.layout.packed_bytes


@dataclass(frozen=True)
class CalibrationInfo:
    """The trace that the experts were quantized with."""

    tokens: int
    sha256: str  # of its header
    texts: tuple[tuple[str, str], ...]  # name and SHA-256 of every text

    def to_dict(self) -> dict[str, object]:
        texts = [{"name": name, "sha256": sha256} for name, sha256 in self.texts]
        return {"tokens": self.tokens, "sha256": self.sha256, "texts": texts}

    @classmethod
    def from_dict(cls, data: dict) -> "CalibrationInfo":
        texts = tuple((text["name"], text["sha256"]) for text in data["texts"])
        return cls(int(data["tokens"]), data["sha256"], texts)


@dataclass(frozen=True)
class Manifest:
    """The content of `foregate.json`."""

    model_class: str
    model_type: str
    bits: int
    quantizer: str  # its name; "none" at 16 bits
    calibration: CalibrationInfo | None  # None without a trace
    layers: tuple[LayerInfo, ...]
    checksums: tuple[tuple[str, ...], ...]  # SHA-256 of every record, by layer and expert
    backbone_checksum: str  # SHA-256 of model.safetensors
    backbone_bytes: int  # of model.safetensors
    backbone_bits: int
    backbone_quantizer: str  # its name; "none" at 16 bits
    matrices: tuple[MatrixInfo, ...]  # of a quantized backbone
    matrix_checksums: tuple[str, ...]  # SHA-256 of every matrix's record
    kept_matrices: tuple[str, ...]  # linear modules that a quantized backbone keeps as they were
    unused_tensors: int  # of the checkpoint, which the text model has no place for

    def to_json(self) -> str:
        layers = [asdict(layer) for layer in self.layers]
        for layer, checksums in zip(layers, self.checksums, strict=True):
            layer["checksums"] = list(checksums)
        backbone: dict[str, object] = {"bytes": self.backbone_bytes, "sha256": self.backbone_checksum}
        if self.backbone_bits != UNQUANTIZED:
            backbone |= {
                "bits": self.backbone_bits,
                "quantizer": self.backbone_quantizer,
                "kept": list(self.kept_matrices),
                "matrices": [
                    {"module": matrix.module, "shape": list(matrix.shape), "sha256": checksum}
                    for matrix, checksum in zip(self.matrices, self.matrix_checksums, strict=True)
                ],
            }
        quantization: dict[str, object] = {"bits": self.bits, "quantizer": self.quantizer}
        if self.calibration:
            quantization["calibration"] = self.calibration.to_dict()
        return json.dumps(
            {
                "format": "foregate store",
                "version": 1
                if self.backbone_bits == UNQUANTIZED
                else FORMAT_VERSION,  # older programs read what they can
                "model": {
                    "class": self.model_class,
                    "type": self.model_type,
                    "unused_tensors": self.unused_tensors,
                },
                "quantization": quantization,
                "backbone": backbone,
                "layers": layers,
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Raises KeyError, TypeError or ValueError when the text is not a manifest of this version."""
        data = json.loads(text)
        backbone = data["backbone"]
        bits = int(backbone.get("bits", UNQUANTIZED))
        calibration = data["quantization"].get("calibration")
        return cls(
            model_class=data["model"]["class"],
            model_type=data["model"]["type"],
            bits=int(data["quantization"]["bits"]),
            quantizer=data["quantization"]["quantizer"],
            calibration=CalibrationInfo.from_dict(calibration) if calibration else None,
            layers=tuple(_layer_from_json(layer) for layer in data["layers"]),
            checksums=tuple(tuple(layer["checksums"]) for layer in data["layers"]),
            backbone_checksum=backbone["sha256"],
            backbone_bytes=int(backbone["bytes"]),
            backbone_bits=bits,
            backbone_quantizer=backbone.get("quantizer", "none"),
            matrices=tuple(_matrix_from_json(matrix, bits) for matrix in backbone.get("matrices", ())),
            matrix_checksums=tuple(matrix["sha256"] for matrix in backbone.get("matrices", ())),
            kept_matrices=tuple(backbone.get("kept", ())),
            unused_tensors=int(data["model"]["unused_tensors"]),
        )


class Contents:
    """What a store holds, by size: records by layer, and the matrices of a quantized backbone.

    Known before there is a store, from a model's configuration alone (`checkpoint/outline.py`).
    """

    def __init__(self, layers: tuple[LayerInfo, ...], matrices: tuple[MatrixInfo, ...]) -> None:
        self.layers = layers
        self.matrices = matrices  # in the order of their file

    @property
    def num_experts(self) -> int:
        """Experts over all layers."""
        return sum(layer.num_experts for layer in self.layers)

    @property
    def record_bytes(self) -> int:
        """Bytes of the largest record: the size of a slot."""
        return max(layer.layout.nbytes for layer in self.layers)

    @property
    def experts_bytes(self) -> int:
        """Bytes of all records."""
        return sum(layer.num_experts * layer.layout.nbytes for layer in self.layers)

    @property
    def matrices_bytes(self) -> int:
        """Bytes of all records of matrices."""
        return sum(matrix.nbytes for matrix in self.matrices)

    @property
    def top_k(self) -> int:
        """The most experts that one token uses in any layer."""
        return max(layer.top_k for layer in self.layers)


class Store(Contents):
    """An opened store. Opening checks versions, headers and sizes; `verify` checks every byte."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.manifest = _read_manifest(self.path)
        super().__init__(self.manifest.layers, self.manifest.matrices)
        self.experts_path = self.path / EXPERTS_FILE
        self.backbone_path = self.path / BACKBONE_FILE
        self.matrices_path = self.path / MATRICES_FILE
        self._offsets = self._check_experts_file()
        self.experts_version = file_version(self.experts_path.stat())
        self._check_backbone_file()
        self._matrix_offsets = self._check_matrices_file() if self.matrices else []

    def location(self, key: ExpertKey) -> tuple[int, int]:
        """(offset in the experts file, bytes) of a record; both multiples of 4096."""
        layer, expert = key
        nbytes = self.layers[layer].layout.nbytes
        return self._offsets[layer] + expert * nbytes, nbytes

    def record_name(self, key: ExpertKey) -> str:
        """The record's tensor name in the experts file."""
        return record_name(self.layers[key[0]], key[1])

    def matrix_location(self, index: int) -> tuple[int, int]:
        """(offset in the matrices file, bytes) of the record of matrix `index`; both multiples of 64."""
        return self._matrix_offsets[index], self.matrices[index].nbytes

    def _check_experts_file(self) -> list[int]:
        entries = read_header(self.experts_path)
        offsets = []
        for layer in self.layers:
            first = entries.get(record_name(layer, 0))
            offsets.append(first.start if first else 0)
            for expert in range(layer.num_experts):
                entry = entries.pop(record_name(layer, expert), None)
                expected = offsets[-1] + expert * layer.layout.nbytes
                if entry is None or entry.start != expected or entry.nbytes != layer.layout.nbytes:
                    raise _damaged(self.experts_path, f"record {record_name(layer, expert)} is missing or misplaced")
            if offsets[-1] % ALIGNMENT:
                raise _damaged(self.experts_path, f"records of {layer.module} are not aligned to {ALIGNMENT} bytes")
        if entries:
            raise _damaged(self.experts_path, f"it holds unknown records, first {next(iter(entries))}")
        return offsets

    def _check_backbone_file(self) -> None:
        read_header(self.backbone_path)
        if self.backbone_path.stat().st_size != self.manifest.backbone_bytes:
            raise _damaged(self.backbone_path, f"its size is not the {self.manifest.backbone_bytes:,} bytes recorded")

    def _check_matrices_file(self) -> list[int]:
        entries = read_header(self.matrices_path)
        first = entries.get(self.matrices[0].module)
        offset, offsets = first.start if first else 0, []
        for matrix in self.matrices:
            entry = entries.pop(matrix.module, None)
            if entry is None or (entry.start, entry.nbytes) != (offset, matrix.nbytes) or offset % TENSOR_ALIGNMENT:
                raise _damaged(self.matrices_path, f"matrix {matrix.module} is missing or misplaced")
            offsets.append(offset)
            offset += matrix.nbytes
        if entries:
            raise _damaged(self.matrices_path, f"it holds unknown matrices, first {next(iter(entries))}")
        return offsets


def file_version(status: os.stat_result) -> tuple[int, int, int]:
    """What differs once a file was written to or replaced: (inode, bytes, time of the last change in ns)."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def record_name(layer: LayerInfo, expert: int) -> str:
    """Tensor name of a record in the experts file."""
    return f"{layer.module}.{expert}"


def experts_header(layers: tuple[LayerInfo, ...]) -> bytes:
    """The header of the experts file, padded so that the first record is aligned."""
    tensors = {
        record_name(layer, expert): ("U8", (layer.layout.nbytes,), layer.layout.nbytes)
        for layer in layers
        for expert in range(layer.num_experts)
    }
    return build_header(tensors, align=ALIGNMENT)


def matrices_header(matrices: tuple[MatrixInfo, ...]) -> bytes:
    """The header of the matrices file, padded so that the first record is aligned."""
    tensors = {matrix.module: ("U8", (matrix.nbytes,), matrix.nbytes) for matrix in matrices}
    return build_header(tensors, align=TENSOR_ALIGNMENT)


def _read_manifest(path: Path) -> Manifest:
    file = path / STORE_MANIFEST
    if not path.is_dir():
        raise ForegateError(f"no such store: {path}")
    if not file.is_file():
        hint = (
            "convert it first: foregate convert SRC DST" if (path / "config.json").exists() else "name a store folder"
        )
        raise ForegateError(f"{path} is not a Foregate store (no {STORE_MANIFEST}): {hint}")
    try:
        text = file.read_text()
        version = json.loads(text)["version"]
        if type(version) is not int or version < 1:
            raise ValueError(version)
        if version > FORMAT_VERSION:
            raise ForegateError(
                f"{path} has store version {version}, this Foregate reads up to {FORMAT_VERSION}: update Foregate"
            )
        return Manifest.from_json(text)
    except OSError as error:
        raise ForegateError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(file, "it is not a store manifest") from None


def _layer_from_json(data: dict) -> LayerInfo:
    tensors = tuple(
        TensorSpec(t["name"], t["dtype"], tuple(int(n) for n in t["shape"]), int(t["offset"]))
        for t in data["layout"]["tensors"]
    )
    params = tuple(
        ParamSpec(p["name"], tuple(int(n) for n in p["shape"]), int(p["bits"])) for p in data["layout"]["params"]
    )
    _check_specs(params, tensors)
    layer = LayerInfo(data["module"], int(data["num_experts"]), int(data["top_k"]), RecordLayout(params, tensors))
    if len(data["checksums"]) != layer.num_experts or any(t.dtype not in DTYPES for t in tensors):
        raise ValueError(layer.module)
    return layer


def _matrix_from_json(data: dict, bits: int) -> MatrixInfo:
    rows, cols = (int(n) for n in data["shape"])
    plane_shapes(bits, rows, cols)  # raises ValueError for what no record holds
    return MatrixInfo(str(data["module"]), (rows, cols), bits)


def _check_specs(params: tuple[ParamSpec, ...], tensors: tuple[TensorSpec, ...]) -> None:
    """Raise ValueError or KeyError unless the tensors are exactly those that hold the parameters."""
    expected: dict[str, tuple[int, ...]] = {}
    for param in params:
        if param.bits in PLANES:
            planes = plane_shapes(param.bits, *param.shape)
            expected |= {f"{param.name}.{plane}": shape for plane, (_, shape) in planes.items()}
        else:
            expected[param.name] = param.shape
    if not expected or {spec.name: spec.shape for spec in tensors} != expected:
        raise ValueError("tensors and parameters of a record differ")


def _damaged(file: Path, what: str) -> ForegateError:
    return ForegateError(f"{file} is damaged: {what}; convert the model again")


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
