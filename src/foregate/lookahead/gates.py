"""All gates of one model: `lookahead.safetensors`, and what they predict while tokens flow.

The file holds float16 tensors named `source-003.base`, `token.down` ...; its metadata says which model the gates fit and
what they were trained on. It lies in a store but depends on the model only, not on how the experts are quantized.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from foregate.errors import ForegateError, first_line
from foregate.lookahead.gate import GateLayer, LookaheadGate, Target, targets, token_source
from foregate.lookahead.metrics import chosen_mask
from foregate.lookahead.reuse import ReuseHead, UseHistory

FORMAT_VERSION = 2
TOKEN_SOURCE = "token"


class OtherVersion(Exception):
    """The file's layout is not the one of this version."""


@dataclass(frozen=True)
class GatesHeader:
    """What the file's metadata says."""

    layers: tuple[GateLayer, ...]
    embedding_size: int
    horizon: int
    width: int  # of every gate's MLP
    trained: dict[str, Any]  # what alignment used and reached; empty for untrained gates

    @property
    def reuse_width(self) -> int:
        """Hidden values of every reuse head: an eighth of the gates', in whole vectors of 8, at least one."""
        return max(self.width // 64, 1) * 8

    def source_name(self, source: int) -> str:
        """Prefix of a source's tensors."""
        return TOKEN_SOURCE if source == len(self.layers) else f"source-{source:03}"

    def input_size(self, source: int) -> int:
        """Values of a source: a router's input, or an embedding."""
        return self.embedding_size if source == len(self.layers) else self.layers[source].input_size

    def new_gate(self, source: int) -> LookaheadGate:
        """A gate of the right shape for `source`, all zeros."""
        aims = [self.layers[target.layer] for target in targets(source, len(self.layers), self.horizon)]
        size = self.input_size(source)
        gate = LookaheadGate(size, [a.num_experts for a in aims], [a.top_k for a in aims], self.width)
        if source < len(self.layers):
            gate.reuse = ReuseHead(size, self.layers[source].num_experts, self.reuse_width)
        return gate

    def check_matches(self, layers: Sequence[Any], path: Path) -> None:
        """Raise ForegateError unless the gates fit a model with these MoE layers (module, num_experts, top_k)."""
        wanted = [(layer.module, layer.num_experts, layer.top_k) for layer in layers]
        if [(layer.module, layer.num_experts, layer.top_k) for layer in self.layers] != wanted:
            raise ForegateError(
                f"{path} holds the lookahead gates of another model ({len(self.layers)} MoE layers of "
                f"{self.layers[0].num_experts} experts): train gates for this one with foregate align {path.parent}"
            )

    def to_json(self) -> str:
        return json.dumps({"version": FORMAT_VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> "GatesHeader":
        """Raises OtherVersion, ValueError, KeyError or TypeError on anything `to_json` would not write."""
        data = json.loads(text)
        if data.pop("version") != FORMAT_VERSION:
            raise OtherVersion
        data["layers"] = tuple(GateLayer(**layer) for layer in data["layers"])
        return cls(**data)


class Foreseen(NamedTuple):
    """What the gate of a source says. Probabilities in float32."""

    ahead: list[np.ndarray]  # [experts] of each target, nearest first
    reuse: np.ndarray | None  # [windows, experts] of the source's own layer, where there is a head


class LookaheadGates:
    """The gates of one model and the latest router scores of the sequence they follow.

    One object follows one sequence. Feed it every router call by `observe`; ask `foresee` for what comes next. Of several
    tokens in one call, a prompt's or a batch's, it says which experts any of them will choose; the last one counts as the
    newest.
    """

    def __init__(self, header: GatesHeader, gates: Sequence[LookaheadGate]) -> None:
        self.header, self.gates = header, tuple(gates)
        self.targets = tuple(
            targets(source, len(header.layers), header.horizon) for source in range(len(header.layers) + 1)
        )
        self.reset()

    def reset(self) -> None:
        """Start a new sequence."""
        self._recent = [torch.zeros(layer.num_experts) for layer in self.header.layers]
        self._history = [UseHistory(layer.num_experts) for layer in self.header.layers]

    def observe(self, layer: int, scores: torch.Tensor, chosen: torch.Tensor) -> None:
        """Note what the router of MoE layer `layer` did.

        scores: float [the newest tokens, num_experts or more], of which the last row is read; chosen: int [tokens, top_k],
        an index outside the experts is none.
        """
        experts = self.header.layers[layer].num_experts
        self._recent[layer] = scores[-1, :experts].float()
        for used in chosen_mask(chosen.long(), experts):
            self._history[layer].observe(used)

    @torch.inference_mode()
    def predict(self, source: int, hidden: torch.Tensor) -> list[tuple[Target, torch.Tensor]]:
        """For each target of `source`, nearest first: float32 [num_experts], the probability of each expert.

        hidden: float32 [tokens, input_size], the router's input of layer `source`, or embeddings of sampled tokens.
        """
        gate = self.gates[source]
        if source == len(self.header.layers):
            hidden = token_source(hidden)
        recent = torch.cat([self._recent[target.layer] for target in self.targets[source]])
        parts = gate.probabilities(gate(hidden, recent.expand(len(hidden), -1)))
        return [(target, 1 - (1 - part).prod(0)) for target, part in zip(self.targets[source], parts, strict=True)]

    @torch.inference_mode()
    def reuse(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [windows, num_experts]: how probable it is that one of the next 1, 4 and 16 tokens uses the expert.

        hidden: float32 [tokens, input_size], the router's input of MoE layer `layer`, whose call was observed.
        """
        features = self._history[layer].features(self._recent[layer])
        return torch.sigmoid(self.gates[layer].reuse(hidden[-1:], features[None]))[0]

    def foresee(self, source: int, hidden: torch.Tensor) -> Foreseen:
        """What `predict` and, where the source's layer has a head, `reuse` say."""
        ahead = [probabilities.numpy() for _, probabilities in self.predict(source, hidden)]
        return Foreseen(ahead, None if self.gates[source].reuse is None else self.reuse(source, hidden).numpy())

    def save(self, path: Path) -> None:
        """Write the gates whole or not at all; an existing file is replaced. Raises OSError."""
        tensors = {
            f"{self.header.source_name(source)}.{name}": value.detach().to(torch.float16).contiguous()
            for source, gate in enumerate(self.gates)
            for name, value in gate.state_dict().items()
        }
        write_whole(path, save(tensors, {"foregate": self.header.to_json()}))

    @classmethod
    def load(cls, path: Path, layers: Sequence[Any]) -> "LookaheadGates":
        """Gates for a model with these MoE layers (`Store.layers`: module, num_experts, top_k).

        Raises ForegateError when the file is missing, damaged or of another model.
        """
        if not path.is_file():
            raise ForegateError(f"{path.parent} has no lookahead gates: train them with foregate align {path.parent}")
        try:
            with safe_open(path, framework="pt") as file:
                header = GatesHeader.from_json(file.metadata()["foregate"])
                header.check_matches(layers, path)
                gates = [_restored(header, source, file) for source in range(len(header.layers) + 1)]
        except OtherVersion:
            raise ForegateError(
                f"{path} was written by another version of Foregate: train the gates again with foregate align {path.parent}"
            ) from None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ForegateError(
                f"{path} is damaged ({first_line(error)}): train the gates again with foregate align {path.parent}"
            ) from None
        return cls(header, gates)


def _restored(header: GatesHeader, source: int, file: Any) -> LookaheadGate:
    """file: as `safe_open` gives it. Raises RuntimeError when a tensor is missing or has another shape."""
    gate, prefix = header.new_gate(source), header.source_name(source) + "."
    names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
    gate.load_state_dict({name.removeprefix(prefix): file.get_tensor(name) for name in names})
    return gate.requires_grad_(False)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises OSError; nothing half-written stays."""
    temporary = path.with_name(path.name + ".new")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
