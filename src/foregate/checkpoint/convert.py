"""Conversion: a checkpoint becomes a store, one expert at a time.

All work happens in `DST.partial`, whose journal records every finished layer: a conversion that was killed goes on
where it stopped. The folder gets its final name in one step at the end, so a store is complete or not there at all.
"""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from foregate import __version__
from foregate.checkpoint.architecture import Architecture, ExpertsModule, inspect_architecture
from foregate.checkpoint.backbone import BACKBONE_BITS, BackboneJob
from foregate.checkpoint.calibration import Calibration, quantize_expert
from foregate.checkpoint.expert_reader import ExpertReader
from foregate.checkpoint.source import STORE_MANIFEST, Checkpoint, open_checkpoint
from foregate.checkpoint.store import (
    EXPERTS_FILE,
    FORMAT_VERSION,
    UNQUANTIZED,
    LayerInfo,
    Manifest,
    RecordLayout,
    Weight,
    experts_header,
    keeps,
)
from foregate.checkpoint.tensors import write_all
from foregate.checkpoint.workspace import Workspace, check_destination, io_error
from foregate.config import ConvertConfig
from foregate.errors import ForegateError
from foregate.lookahead.trace import Trace
from foregate.quantize.base import Quantizer
from foregate.quantize.matrix import BITS
from foregate.quantize.registry import UNCALIBRATED, choose_quantizer

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    bits: int = ConvertConfig.bits,
    quantizer: str | None = ConvertConfig.quantizer,
    backbone_bits: int = ConvertConfig.backbone_bits,
    trace: str | Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Convert the checkpoint `source` (folder or hub id) into a store at `destination`; returns its path.

    bits: 16 keeps the checkpoint's own precision; 8, 4, 3 and 2 quantize the experts' matrices with `quantizer`.
    backbone_bits: 8 and 4 quantize the linear modules of the decoder layers too, routers and small gates excepted.
    quantizer: None for the best there is: "refit", or "gptq" with a trace. trace: folder of a trace of this model, by
    whose inputs the experts' errors are weighted. Peak memory is a few experts beside the libraries, whatever the
    model's size. Run again after an interruption, it resumes.
    Raises ForegateError on input it cannot convert, an existing destination, or lack of disk space.
    """
    if bits not in (UNQUANTIZED, *BITS):
        raise ForegateError(f"--bits {bits}: choose 16 (the checkpoint's own precision), 8, 4, 3 or 2")
    if backbone_bits not in BACKBONE_BITS:
        raise ForegateError(f"--backbone-bits {backbone_bits}: choose 16 (the checkpoint's own precision), 8 or 4")
    try:
        destination = check_destination(destination)
    except OSError as error:
        raise io_error(error, Path(destination), "convert to") from None
    if trace is not None and bits == UNQUANTIZED:
        raise ForegateError("--trace changes how experts are quantized: name --bits 8, 4, 3 or 2, or leave it out")
    chosen = choose_quantizer(quantizer, calibrated=trace is not None)
    checkpoint = open_checkpoint(source)
    architecture = inspect_architecture(checkpoint.config)
    calibration = None if trace is None else Calibration(Trace(trace), architecture.layers)
    reader = ExpertReader(checkpoint, architecture)
    backbone = BackboneJob(reader, backbone_bits, UNCALIBRATED if chosen.needs_inputs else chosen.name)
    encoder = ExpertEncoder(bits, chosen, architecture, calibration)
    job = _Job(checkpoint, architecture, reader, encoder, backbone)
    try:
        with Workspace(destination, job.fingerprint, job.output_bytes) as work:
            job.run(work, progress or (lambda done, total: None))
            work.publish()
    except OSError as error:
        raise io_error(error, destination, "convert to") from None
    return destination


class ExpertEncoder:
    """What becomes of an expert's parameters on their way into the record."""

    def __init__(
        self, bits: int, quantizer: Quantizer, architecture: Architecture, calibration: Calibration | None
    ) -> None:
        self.bits = bits
        self.name = "none" if bits == UNQUANTIZED else quantizer.name
        self.info = calibration.info if calibration else None
        self._quantizer, self._architecture, self._calibration = quantizer, architecture, calibration

    def layout(self, params: dict[str, torch.Tensor]) -> RecordLayout:
        """The layout of the records of experts whose parameters are like these."""
        return RecordLayout.at(self.bits, params)

    def encode(self, params: dict[str, torch.Tensor], layer: ExpertsModule, expert: int) -> dict[str, Weight]:
        """Matrices quantized, biases as they are. Raises ForegateError, naming them, for weights that are not finite."""
        where = f"expert {expert} of {layer.name}"
        if self._calibration:
            experts = self._architecture.model.get_submodule(layer.name)
            inputs = self._calibration.inputs(layer, expert)
            return quantize_expert(params, experts, inputs, self._quantizer, self.bits, where)
        return {
            name: param
            if keeps(param, self.bits)
            else self._quantizer.quantize(param, self.bits, name=f"{name} of {where}")
            for name, param in params.items()
        }


class _Job:
    """One conversion: what will be written is known before the first byte is."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        reader: ExpertReader,
        encoder: ExpertEncoder,
        backbone: BackboneJob,
    ) -> None:
        self.backbone = backbone
        self.checkpoint, self.architecture, self.reader, self.encoder = checkpoint, architecture, reader, encoder
        self.layers = tuple(
            LayerInfo(layer.name, layer.num_experts, layer.top_k, encoder.layout(reader.read(layer, 0)))
            for layer in architecture.layers
        )
        self.experts_header = experts_header(self.layers)
        self.experts_bytes = len(self.experts_header) + sum(n.num_experts * n.layout.nbytes for n in self.layers)

    @property
    def output_bytes(self) -> int:
        return self.experts_bytes + self.backbone.output_bytes

    @property
    def fingerprint(self) -> str:
        """Changes whenever a resumed conversion would not continue the same work."""
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.checkpoint.weight_files()]
        facts = [FORMAT_VERSION, __version__, self.encoder.bits, self.encoder.name, str(self.checkpoint.path), files]
        facts += [self.backbone.bits, self.backbone.quantizer_name, self.encoder.info and self.encoder.info.to_dict()]
        headers = self.experts_header + self.backbone.rest_header + self.backbone.matrices_header
        return hashlib.sha256(json.dumps(facts).encode() + headers).hexdigest()

    def run(self, work: Workspace, progress: Progress) -> None:
        """Do what the journal says is still to do."""
        self._copy_side_files(work)
        work.allocate(EXPERTS_FILE, self.experts_bytes)
        self.backbone.run(work, lambda n: progress(n, self.output_bytes))
        done = self.backbone.output_bytes + len(self.experts_header)
        for index, layer in enumerate(self.layers):
            if index >= len(work.layer_checksums):
                advance = partial(lambda start, n: progress(start + n, self.output_bytes), done)
                work.layer_finished(self._write_layer(work, index, advance))
            done += layer.num_experts * layer.layout.nbytes
            progress(done, self.output_bytes)
        work.write(STORE_MANIFEST, self._manifest(work).to_json().encode())

    def _write_layer(self, work: Workspace, index: int, advance: Callable[[int], None]) -> list[str]:
        info, module = self.layers[index], self.architecture.layers[index]
        base = len(self.experts_header) + sum(n.num_experts * n.layout.nbytes for n in self.layers[:index])
        checksums = []
        with work.open(EXPERTS_FILE) as fd:
            if index == 0:
                write_all(fd, self.experts_header, 0)
            for expert in range(info.num_experts):
                record = info.layout.pack(self._expert(module, expert))
                write_all(fd, record, base + expert * info.layout.nbytes)
                checksums.append(hashlib.sha256(record).hexdigest())
                advance((expert + 1) * info.layout.nbytes)
        return checksums

    def _expert(self, layer: ExpertsModule, expert: int) -> dict[str, Weight]:
        return self.encoder.encode(self.reader.read(layer, expert), layer, expert)

    def _copy_side_files(self, work: Workspace) -> None:
        for file in self.checkpoint.side_files():
            if file.name == "config.json":
                config = json.loads(file.read_text())
                for unwanted in ("quantization_config", "auto_map"):  # records are not quantized; code is never run
                    config.pop(unwanted, None)
                work.write("config.json", json.dumps(config, indent=2).encode())
            else:
                work.write(file.name, file.read_bytes())

    def _manifest(self, work: Workspace) -> Manifest:
        return Manifest(
            model_class=self.architecture.class_name,
            model_type=self.checkpoint.config.model_type,
            bits=self.encoder.bits,
            quantizer=self.encoder.name,
            calibration=self.encoder.info,
            layers=self.layers,
            checksums=tuple(tuple(sums) for sums in work.layer_checksums),
            backbone_checksum=work.backbone_checksum or "",
            backbone_bytes=self.backbone.rest_bytes,
            backbone_bits=self.backbone.bits,
            backbone_quantizer=self.backbone.quantizer_name,
            matrices=self.backbone.matrices,
            matrix_checksums=tuple(work.matrix_checksums),
            kept_matrices=self.backbone.kept,
            unused_tensors=len(self.reader.unused),
        )
