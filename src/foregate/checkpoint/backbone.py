"""The backbone's part of a conversion: matrices to quantize go into one file, the rest as it is into another."""

import hashlib
from collections.abc import Callable

from foregate.checkpoint.architecture import BackboneMatrices, backbone_matrices
from foregate.checkpoint.expert_reader import ExpertReader
from foregate.checkpoint.matrix_reader import MatrixReader
from foregate.checkpoint.store import BACKBONE_FILE, MATRICES_FILE, UNQUANTIZED, MatrixInfo, matrices_header
from foregate.checkpoint.tensors import build_header, write_all
from foregate.checkpoint.workspace import Workspace
from foregate.quantize.registry import quantizer as quantizer_by_name

BACKBONE_BITS = (UNQUANTIZED, 8, 4)


class BackboneJob:
    """Writes the backbone: what will be written is known before the first byte is."""

    def __init__(self, reader: ExpertReader, bits: int, quantizer: str) -> None:
        quantized = bits != UNQUANTIZED
        self.bits, self.quantizer_name = bits, quantizer if quantized else "none"
        self._quantizer = quantizer_by_name(quantizer)
        wanted = backbone_matrices(reader.architecture) if quantized else BackboneMatrices({}, ())
        self._reader = MatrixReader(reader, wanted)
        self.kept = self._reader.kept
        self.matrices = tuple(MatrixInfo(module, shape, bits) for module, shape in self._reader.shapes.items())
        self.matrices_header = matrices_header(self.matrices) if self.matrices else b""
        self.matrices_bytes = len(self.matrices_header) + sum(matrix.nbytes for matrix in self.matrices)
        self._entries = [reader.checkpoint.tensors[key] for key in self._reader.rest]
        self.rest_header = build_header({e.name: (e.dtype, e.shape, e.nbytes) for e in self._entries})
        self.rest_bytes = len(self.rest_header) + sum(entry.nbytes for entry in self._entries)

    @property
    def output_bytes(self) -> int:
        """Bytes of both files."""
        return self.rest_bytes + self.matrices_bytes

    def run(self, work: Workspace, advance: Callable[[int], None]) -> None:
        """Do what the journal says is still to do; `advance` hears how many bytes are done."""
        work.allocate(BACKBONE_FILE, self.rest_bytes)
        if work.backbone_checksum is None:
            work.backbone_finished(self._write_rest(work, advance))
        if not self.matrices:
            return
        work.allocate(MATRICES_FILE, self.matrices_bytes)
        offset = len(self.matrices_header)
        for index, matrix in enumerate(self.matrices):
            if index >= len(work.matrix_checksums):
                work.matrix_finished(self._write_matrix(work, matrix, offset))
            offset += matrix.nbytes
            advance(self.rest_bytes + offset)

    def _write_rest(self, work: Workspace, advance: Callable[[int], None]) -> str:
        checksum, offset = hashlib.sha256(self.rest_header), len(self.rest_header)
        with work.open(BACKBONE_FILE) as fd:
            write_all(fd, self.rest_header, 0)
            for entry in self._entries:
                for piece in entry.chunks():
                    write_all(fd, piece, offset)
                    checksum.update(piece)
                    offset += len(piece)
                    advance(offset)
        return checksum.hexdigest()

    def _write_matrix(self, work: Workspace, matrix: MatrixInfo, offset: int) -> str:
        weight = self._reader.read(matrix.module)
        quantized = self._quantizer.quantize(weight, self.bits, name=f"{matrix.module}.weight")
        record = matrix.layout.pack({"weight": quantized})[: matrix.nbytes]
        with work.open(MATRICES_FILE) as fd:
            write_all(fd, self.matrices_header, 0)
            write_all(fd, record, offset)
        return hashlib.sha256(record).hexdigest()
