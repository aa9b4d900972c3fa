"""What came of judging gates: figures by target, by kind of target, by text and over all."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from foregate.lookahead.scores import Score

FORMAT_VERSION = 1
DIGITS = 5  # of figures in JSON


@dataclass(frozen=True)
class Cell:
    """One target of one source."""

    source: str  # as in the gates' file
    horizon: int  # 1 is the next MoE layer
    layer: int  # the target
    next_token: bool  # whether it lies beyond the token boundary
    scores: dict[str, Score]  # by method
    recall_by_text: dict[str, dict[str, float | None]]  # by text and method


@dataclass(frozen=True)
class Group:
    """All targets of a kind together."""

    kind: str  # "in token", "next token" or "from token"
    horizon: int
    targets: int
    scores: dict[str, Score]


@dataclass(frozen=True)
class GateEvaluation:
    """The result of `evaluate_gates`. A method that some target cannot have is left out of its groups."""

    model_class: str
    num_layers: int
    num_experts: tuple[int, ...]  # by MoE layer
    top_k: tuple[int, ...]
    trace: dict[str, Any]  # tokens judged, bits and quantizer of the experts that ran, texts
    fitted_on: str  # what frequencies and ceiling were taken from
    gates: dict[str, Any] | None  # what the gates' file says; None: there were none
    horizon: int
    seen_in_training: tuple[str, ...]  # texts the gates were trained on: figures on them say little
    overall: dict[str, Score]
    groups: tuple[Group, ...]
    texts: dict[str, dict[str, Score]]  # over all targets
    cells: tuple[Cell, ...]

    def to_json(self) -> str:
        """One JSON object; its layout is that of the dataclasses, `version` says which."""
        return json.dumps({"version": FORMAT_VERSION, **_rounded(asdict(self))}, indent=1)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
