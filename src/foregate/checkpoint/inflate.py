"""Inflation: a small trained MoE model becomes a wide one that computes the same function.

The result is a plain Hugging Face checkpoint: the source's tensors under the source's names, each one widened (`growth`
says how) and written piece by piece into numbered shards. It is an instrument for benchmarks: routing and text are those
of the trained model, bytes and operations those of a large one.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import dot_natural_key

from foregate.checkpoint.architecture import Architecture, inspect_architecture
from foregate.checkpoint.expert_reader import ExpertReader
from foregate.checkpoint.growth import Growth
from foregate.checkpoint.source import GATES_FILE, Checkpoint, open_checkpoint
from foregate.checkpoint.tensors import DTYPES, TensorEntry, build_header, write_all
from foregate.checkpoint.widen import Axes, wide_pieces, wide_shape
from foregate.checkpoint.workspace import PartialFolder, check_destination, io_error
from foregate.config import InflateConfig
from foregate.lookahead.gate import GateLayer
from foregate.lookahead.gates import LookaheadGates
from foregate.lookahead.inflate import inflate_gates

INDEX_FILE = "model.safetensors.index.json"
Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


def inflate(
    source: str | Path,
    destination: str | Path,
    *,
    hidden: int,
    ffn: int,
    shard_bytes: int = InflateConfig.shard_bytes,
    progress: Progress | None = None,
) -> Path:
    """Widen the checkpoint `source` (folder or hub id) into a checkpoint at `destination`; returns its path.

    hidden: the new hidden size, a multiple of the source's; ffn: the new inner size of the experts, likewise. The
    attention heads, the experts' number and everything else stay. shard_bytes: at most so many bytes of tensors a file,
    or one tensor if that is more. Weights keep their dtype and are multiplied by nothing but powers of two. Tokenizer and
    generation settings are copied, lookahead gates inflated. Peak memory is one tensor of the source and one piece of 32
    MiB beside the libraries. Nothing is resumed: run again, it starts anew.
    Raises ForegateError on a model it cannot inflate, sizes that do not fit, an existing destination, or lack of disk
    space.
    """
    try:
        destination = check_destination(destination)
    except OSError as error:
        raise io_error(error, Path(destination), "inflate to") from None
    job = _Job(open_checkpoint(source), hidden, ffn, shard_bytes)
    try:
        with _Folder(destination, job.output_bytes) as work:
            job.run(work, progress or (lambda done, total: None))
            work.publish()
    except OSError as error:
        raise io_error(error, destination, "inflate to") from None
    return destination


class _Folder(PartialFolder):
    """The folder of an inflation, which is done anew each time."""

    job = "inflation"
    result = "inflated checkpoint"

    def __init__(self, destination: Path, output_bytes: int) -> None:
        super().__init__(destination, "", output_bytes)  # nothing is resumed, so no work needs telling apart

    @staticmethod
    def worth_resuming(journal: dict[str, Any]) -> bool:
        return False


@dataclass(frozen=True)
class _WideTensor:
    """A tensor to be written."""

    entry: TensorEntry
    axes: Axes

    @property
    def shape(self) -> tuple[int, ...]:
        return wide_shape(self.entry.shape, self.axes)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.entry.dtype].itemsize


class _Job:
    """One inflation: what will be written is known before the first byte is."""

    def __init__(self, checkpoint: Checkpoint, hidden: int, ffn: int, shard_bytes: int) -> None:
        self.checkpoint, self.growth = checkpoint, Growth(checkpoint, hidden, ffn)
        architecture = inspect_architecture(checkpoint.config)
        axes = self.growth.axes(ExpertReader(checkpoint, architecture))
        tensors = [_WideTensor(checkpoint.tensors[key], axes[key]) for key in sorted(axes, key=dot_natural_key)]
        self.shards = _shards(tensors, shard_bytes)
        self.gates = self._inflate_gates(architecture)

    @property
    def output_bytes(self) -> int:
        return sum(tensor.nbytes for shard in self.shards.values() for tensor in shard)

    def run(self, work: PartialFolder, progress: Progress) -> None:
        """Write the whole checkpoint."""
        self._write_side_files(work)
        done = 0
        for name, tensors in self.shards.items():
            for written in _write_shard(work, name, tensors):
                done += written
                progress(done, self.output_bytes)
        places = {tensor.entry.name: name for name, tensors in self.shards.items() for tensor in tensors}
        index = {"metadata": {"total_size": self.output_bytes}, "weight_map": places}
        work.write(INDEX_FILE, json.dumps(index, indent=2).encode())

    def _inflate_gates(self, architecture: Architecture) -> LookaheadGates | None:
        path, size = self.checkpoint.path / GATES_FILE, self.growth.hidden
        if not path.is_file():
            return None
        layers = [GateLayer(n.name, n.num_experts, n.top_k, size.small) for n in architecture.layers]
        return inflate_gates(LookaheadGates.load(path, layers), size.small, size.wide)

    def _write_side_files(self, work: PartialFolder) -> None:
        for file in self.checkpoint.side_files():
            if file.name not in ("config.json", GATES_FILE):
                work.write(file.name, file.read_bytes())
        work.write("config.json", json.dumps(self.growth.config_json(), indent=2).encode())
        if self.gates:
            self.gates.save(work.path / GATES_FILE)


def _shards(tensors: Sequence[_WideTensor], limit: int) -> dict[str, list[_WideTensor]]:
    """The tensors in their order, cut into files of at most `limit` bytes; one that is larger has a file of its own."""
    groups: list[list[_WideTensor]] = []
    room = 0
    for tensor in tensors:
        if tensor.nbytes > room:
            groups.append([])
            room = limit
        groups[-1].append(tensor)
        room -= tensor.nbytes
    return {f"model-{n:05}-of-{len(groups):05}.safetensors": group for n, group in enumerate(groups, 1)}


def _write_shard(work: PartialFolder, name: str, tensors: Sequence[_WideTensor]) -> Iterator[int]:
    """Write one file; yields the bytes of tensors that each step wrote."""
    header = build_header({t.entry.name: (t.entry.dtype, t.shape, t.nbytes) for t in tensors})
    offset = len(header)
    work.allocate(name, offset + sum(tensor.nbytes for tensor in tensors))
    with work.open(name) as fd:
        write_all(fd, header, 0)
        for tensor in tensors:
            for piece in wide_pieces(tensor.entry.read(), tensor.axes):
                data = memoryview(piece.flatten().view(torch.uint8).numpy())
                write_all(fd, data, offset)
                offset += len(data)
                yield len(data)
