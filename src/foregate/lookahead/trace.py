"""A trace on disk: what every router of a model was given, how it scored the experts and which were used, by token.

The folder holds `trace.json` and raw little-endian files of one row a token (docs/gates.md). A trace can be far larger
than memory: `Trace` maps the files.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from foregate.checkpoint.architecture import ExpertsModule
from foregate.checkpoint.store import LayerInfo
from foregate.errors import ForegateError
from foregate.lookahead.gate import RouterWeights

FORMAT_VERSION = 1
HEADER_FILE = "trace.json"
TOKENS_FILE = "tokens.i32"
EMBEDDINGS_FILE = "embeddings.bf16"
ROUTERS_FILE = "routers.safetensors"
SUFFIXES = {torch.bfloat16: "bf16", torch.int16: "i16"}


@dataclass(frozen=True)
class TraceLayer:
    """One MoE layer in a trace."""

    module: str  # module path of its experts
    router: str  # module path of its router
    num_experts: int
    top_k: int
    input_size: int  # of the router's input
    expert_input_size: int
    scores_size: int  # scores a token: num_experts, or more where the router can choose "none"
    shares_input: bool  # whether the experts are given exactly what the router is given

    def columns(self) -> dict[str, tuple[torch.dtype, int]]:
        """Values a token by name: their type and number."""
        columns = {
            "inputs": (torch.bfloat16, self.input_size),
            "scores": (torch.bfloat16, self.scores_size),
            "chosen": (torch.int16, self.top_k),
        }
        if not self.shares_input:
            columns["experts"] = (torch.bfloat16, self.expert_input_size)
        return columns


@dataclass(frozen=True)
class TraceText:
    """A text the model ran over."""

    name: str
    sha256: str
    bytes: int
    tokens: int  # of the whole text; a trace may hold fewer


@dataclass(frozen=True)
class Sequence:
    """Consecutive rows that the model saw as one sequence."""

    start: int
    length: int
    text: int  # index among the texts


@dataclass(frozen=True)
class TraceHeader:
    """What `trace.json` says."""

    model_type: str
    model_class: str
    bits: int  # of the experts that ran
    quantizer: str
    vocab_size: int
    embedding_size: int
    backbone_parameters: int  # everything but the experts
    window: int
    generated: int  # tokens at the end of each sequence that the model wrote itself
    layers: tuple[TraceLayer, ...]
    texts: tuple[TraceText, ...]
    sequences: tuple[Sequence, ...]

    @property
    def num_tokens(self) -> int:
        return sum(sequence.length for sequence in self.sequences)

    def files(self) -> dict[str, int]:
        """Name of every data file -> its bytes."""
        files = {
            TOKENS_FILE: self.num_tokens * torch.int32.itemsize,
            EMBEDDINGS_FILE: self.num_tokens * self.embedding_size * torch.bfloat16.itemsize,
        }
        for index, layer in enumerate(self.layers):
            for column, (dtype, width) in layer.columns().items():
                files[column_file(column, dtype, index)] = self.num_tokens * width * dtype.itemsize
        return files

    @property
    def nbytes(self) -> int:
        """Bytes of all files of one row a token."""
        return sum(self.files().values())

    def to_json(self) -> str:
        data = {"version": FORMAT_VERSION, "tokens": self.num_tokens, **asdict(self)}
        data["sequences"] = [[s.start, s.length, s.text] for s in self.sequences]
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "TraceHeader":
        """Raises ValueError, KeyError or TypeError on anything `to_json` would not write."""
        data = json.loads(text)
        del data["version"]
        tokens = data.pop("tokens")
        data["layers"] = tuple(TraceLayer(**layer) for layer in data["layers"])
        data["texts"] = tuple(TraceText(**item) for item in data["texts"])
        data["sequences"] = tuple(Sequence(*map(int, item)) for item in data["sequences"])
        header = cls(**data)
        _check_layers(header)
        _check_sequences(header, tokens)
        return header


class Trace:
    """An opened trace. Opening checks the header and the files' sizes.

    Tensors are maps of the files: nothing is read before it is used. Writing to them does not change the files.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.header = _read_header(self.path)
        for name, nbytes in self.header.files().items():
            _check_size(self.path / name, nbytes)
        if not (self.path / ROUTERS_FILE).is_file():
            raise _damaged(self.path / ROUTERS_FILE, "it is missing")

    @property
    def model_type(self) -> str:
        return self.header.model_type

    @property
    def layers(self) -> tuple[TraceLayer, ...]:
        return self.header.layers

    @property
    def texts(self) -> tuple[TraceText, ...]:
        return self.header.texts

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        return self.header.sequences

    @property
    def num_tokens(self) -> int:
        return self.header.num_tokens

    @property
    def tokens(self) -> torch.Tensor:
        """Token ids, int32 [tokens]."""
        return self._map(TOKENS_FILE, torch.int32, (self.num_tokens,))

    @property
    def embeddings(self) -> torch.Tensor:
        """What the input embedding gave for every token: bfloat16 [tokens, embedding_size]."""
        return self._map(EMBEDDINGS_FILE, torch.bfloat16, (self.num_tokens, self.header.embedding_size))

    def router(self, layer: int) -> RouterWeights:
        """What is known of a router's weights, for its num_experts experts. Raises ForegateError on a damaged file."""
        info, found = self.layers[layer], {}
        sizes = {"weight": (info.scores_size, info.input_size), "bias": (info.scores_size,), "gain": (info.input_size,)}
        file = self.path / ROUTERS_FILE
        try:
            with safe_open(file, framework="pt") as tensors:
                names = set(tensors.keys())
                for name, shape in sizes.items():
                    if router_tensor(name, layer) in names:
                        found[name] = tensors.get_tensor(router_tensor(name, layer)).view(shape)
        except (OSError, SafetensorError, RuntimeError):
            raise _damaged(file, f"the router of {info.module} cannot be read") from None
        weight, bias, gain = (found.get(name) for name in sizes)
        experts = slice(info.num_experts)
        return RouterWeights(
            weight=None if weight is None else weight[experts], bias=None if bias is None else bias[experts], gain=gain
        )

    def inputs(self, layer: int) -> torch.Tensor:
        """What the router was given: bfloat16 [tokens, input_size]."""
        return self._column("inputs", layer)

    def scores(self, layer: int) -> torch.Tensor:
        """The router's logits: bfloat16 [tokens, scores_size]."""
        return self._column("scores", layer)

    def chosen(self, layer: int) -> torch.Tensor:
        """Experts asked for: int16 [tokens, top_k]. An index outside 0..num_experts-1 is no expert."""
        return self._column("chosen", layer)

    def expert_inputs(self, layer: int) -> torch.Tensor:
        """What the experts were given: bfloat16 [tokens, expert_input_size]."""
        return self.inputs(layer) if self.layers[layer].shares_input else self._column("experts", layer)

    def check_matches(self, layers: Iterable[LayerInfo | ExpertsModule]) -> None:
        """Raise ForegateError unless the trace was recorded from a model with these MoE layers."""
        wanted = [
            (layer.module if isinstance(layer, LayerInfo) else layer.name, layer.num_experts, layer.top_k)
            for layer in layers
        ]
        if [(layer.module, layer.num_experts, layer.top_k) for layer in self.layers] != wanted:
            raise ForegateError(
                f"{self.path} is the trace of another model ({self.header.model_class}, {len(self.layers)} MoE layers): "
                "record one of this model with foregate trace"
            )

    def _column(self, column: str, layer: int) -> torch.Tensor:
        dtype, width = self.layers[layer].columns()[column]
        return self._map(column_file(column, dtype, layer), dtype, (self.num_tokens, width))

    def _map(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        file = self.path / name
        try:
            return torch.from_file(str(file), shared=False, size=prod(shape), dtype=dtype).view(shape)
        except RuntimeError:
            raise _damaged(file, "it cannot be mapped") from None


def column_file(column: str, dtype: torch.dtype, layer: int) -> str:
    """Name of the file that holds a column of a layer."""
    return f"{column}-{layer:03}.{SUFFIXES[dtype]}"


def router_tensor(name: str, layer: int) -> str:
    """Name of a tensor in the routers file; `name` is weight, bias or gain."""
    return f"{name}-{layer:03}"


def _check_layers(header: TraceHeader) -> None:
    if any(type(size) is not int or size < 1 for size in (header.embedding_size, header.backbone_parameters)):
        raise ValueError(header.embedding_size, header.backbone_parameters)
    for layer in header.layers:
        sizes = (layer.num_experts, layer.top_k, layer.input_size, layer.expert_input_size, layer.scores_size)
        if any(type(size) is not int or size < 1 for size in sizes) or type(layer.shares_input) is not bool:
            raise ValueError(layer)


def _check_sequences(header: TraceHeader, tokens: int) -> None:
    end = 0
    for sequence in header.sequences:
        if sequence.start != end or sequence.length < 1 or not 0 <= sequence.text < len(header.texts):
            raise ValueError(sequence)
        end += sequence.length
    if not end or end != tokens or not header.layers:
        raise ValueError(tokens)


def _read_header(path: Path) -> TraceHeader:
    file = path / HEADER_FILE
    if not path.is_dir():
        raise ForegateError(f"no such trace: {path}")
    try:
        text = file.read_text()
        version = json.loads(text)["version"]
        if type(version) is not int or version < 1:
            raise ValueError(version)
        if version > FORMAT_VERSION:
            raise ForegateError(
                f"{path} has trace version {version}, this Foregate reads up to {FORMAT_VERSION}: update Foregate"
            )
        return TraceHeader.from_json(text)
    except FileNotFoundError:
        raise ForegateError(f"{path} is not a trace (no {HEADER_FILE}): record one with foregate trace") from None
    except OSError as error:
        raise ForegateError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(file, "it is not the header of a trace") from None


def _check_size(file: Path, nbytes: int) -> None:
    if not file.is_file():
        raise _damaged(file, "it is missing")
    if file.stat().st_size != nbytes:
        raise _damaged(file, f"it has {file.stat().st_size:,} bytes, not the {nbytes:,} that {HEADER_FILE} says")


def _damaged(file: Path, what: str) -> ForegateError:
    return ForegateError(f"{file} is damaged: {what}; record the trace again")
