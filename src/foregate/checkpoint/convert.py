"""Conversion: a checkpoint becomes a store, one expert at a time.

All work happens in `DST.partial`, whose journal records every finished layer: a conversion that was killed goes on
where it stopped. The folder gets its final name in one step at the end, so a store is complete or not there at all.
"""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from foregate import __version__
from foregate.checkpoint.architecture import Architecture, ExpertsModule, inspect_architecture
from foregate.checkpoint.expert_reader import ExpertReader
from foregate.checkpoint.source import STORE_MANIFEST, Checkpoint, open_checkpoint
from foregate.checkpoint.store import (
    BACKBONE_FILE,
    EXPERTS_FILE,
    FORMAT_VERSION,
    LayerInfo,
    Manifest,
    RecordLayout,
    Weight,
    experts_header,
)
from foregate.checkpoint.tensors import build_header, write_all
from foregate.checkpoint.workspace import Workspace
from foregate.config import ConvertConfig
from foregate.errors import ForegateError
from foregate.quantize.matrix import BITS
from foregate.quantize.registry import quantizer as quantizer_by_name

UNQUANTIZED = 16
Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    bits: int = ConvertConfig.bits,
    quantizer: str = ConvertConfig.quantizer,
    progress: Progress | None = None,
) -> Path:
    """Convert the checkpoint `source` (folder or hub id) into a store at `destination`; returns its path.

    bits: 16 keeps the checkpoint's own precision; 8, 4, 3 and 2 quantize the experts' matrices with `quantizer`. Peak
    memory is a few experts beside the libraries, whatever the model's size. Run again after an interruption, it resumes.
    Raises ForegateError on input it cannot convert, an existing destination, or lack of disk space.
    """
    if bits not in (UNQUANTIZED, *BITS):
        raise ForegateError(f"--bits {bits}: choose 16 (the checkpoint's own precision), 8, 4, 3 or 2")
    destination = Path(destination).expanduser().absolute()
    try:
        if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
            raise ForegateError(f"{destination} exists already: remove it or name another destination")
    except OSError as error:
        raise _io_error(error, destination) from None
    checkpoint = open_checkpoint(source)
    architecture = inspect_architecture(checkpoint.config)
    reader = ExpertReader(checkpoint, architecture)
    job = _Job(checkpoint, architecture, reader, ExpertEncoder(bits, quantizer))
    try:
        with Workspace(destination, job.fingerprint, job.output_bytes) as work:
            job.run(work, progress or (lambda done, total: None))
            work.publish()
    except OSError as error:
        raise _io_error(error, destination) from None
    return destination


class ExpertEncoder:
    """What becomes of an expert's parameters on their way into the record."""

    def __init__(self, bits: int, quantizer: str) -> None:
        self.bits = bits
        self.name = "none" if bits == UNQUANTIZED else quantizer
        self._quantizer = quantizer_by_name(quantizer)

    def encode(self, params: dict[str, torch.Tensor], where: str) -> dict[str, Weight]:
        """Matrices quantized, biases as they are. Raises ForegateError naming `where` for weights that are not finite."""
        if self.bits == UNQUANTIZED:
            return dict(params)
        return {
            name: self._quantizer.quantize(param, self.bits, name=f"{name} of {where}") if param.dim() == 2 else param
            for name, param in params.items()
        }


class _Job:
    """One conversion: what will be written is known before the first byte is."""

    def __init__(
        self, checkpoint: Checkpoint, architecture: Architecture, reader: ExpertReader, encoder: ExpertEncoder
    ) -> None:
        self.checkpoint, self.architecture, self.reader, self.encoder = checkpoint, architecture, reader, encoder
        self.layers = tuple(
            LayerInfo(layer.name, layer.num_experts, layer.top_k, RecordLayout.of(self._expert(layer, 0)))
            for layer in architecture.layers
        )
        self.experts_header = experts_header(self.layers)
        self.experts_bytes = len(self.experts_header) + sum(n.num_experts * n.layout.nbytes for n in self.layers)
        entries = [checkpoint.tensors[key] for key in reader.backbone]
        self.backbone_header = build_header({e.name: (e.dtype, e.shape, e.nbytes) for e in entries})
        self.backbone_bytes = len(self.backbone_header) + sum(entry.nbytes for entry in entries)

    @property
    def output_bytes(self) -> int:
        return self.experts_bytes + self.backbone_bytes

    @property
    def fingerprint(self) -> str:
        """Changes whenever a resumed conversion would not continue the same work."""
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.checkpoint.weight_files()]
        facts = [FORMAT_VERSION, __version__, self.encoder.bits, self.encoder.name, str(self.checkpoint.path), files]
        headers = self.experts_header + self.backbone_header
        return hashlib.sha256(json.dumps(facts).encode() + headers).hexdigest()

    def run(self, work: Workspace, progress: Progress) -> None:
        """Do what the journal says is still to do."""
        self._copy_side_files(work)
        work.allocate(EXPERTS_FILE, self.experts_bytes)
        work.allocate(BACKBONE_FILE, self.backbone_bytes)
        if work.backbone_checksum is None:
            work.backbone_finished(self._write_backbone(work, lambda n: progress(n, self.output_bytes)))
        done = self.backbone_bytes + len(self.experts_header)
        for index, layer in enumerate(self.layers):
            if index >= len(work.layer_checksums):
                advance = partial(lambda start, n: progress(start + n, self.output_bytes), done)
                work.layer_finished(self._write_layer(work, index, advance))
            done += layer.num_experts * layer.layout.nbytes
            progress(done, self.output_bytes)
        work.write(STORE_MANIFEST, self._manifest(work).to_json().encode())

    def _write_backbone(self, work: Workspace, advance: Callable[[int], None]) -> str:
        checksum, offset = hashlib.sha256(self.backbone_header), len(self.backbone_header)
        with work.open(BACKBONE_FILE) as fd:
            write_all(fd, self.backbone_header, 0)
            for key in self.reader.backbone:
                for piece in self.checkpoint.tensors[key].chunks():
                    write_all(fd, piece, offset)
                    checksum.update(piece)
                    offset += len(piece)
                    advance(offset)
        return checksum.hexdigest()

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
        return self.encoder.encode(self.reader.read(layer, expert), f"expert {expert} of {layer.name}")

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
            layers=self.layers,
            checksums=tuple(tuple(sums) for sums in work.layer_checksums),
            backbone_checksum=work.backbone_checksum or "",
            backbone_bytes=self.backbone_bytes,
            unused_tensors=len(self.reader.unused),
        )


def _io_error(error: OSError, destination: Path) -> ForegateError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        kept = Workspace.path_for(destination)
        what = f"finished layers are kept in {kept}: free space and run again" if kept.exists() else "nothing was left"
        return ForegateError(f"the disk of {destination} is full; {what}")
    return ForegateError(
        f"cannot convert to {destination}: {error.filename or 'a file'}: {os.strerror(error.errno or 0)}"
    )
