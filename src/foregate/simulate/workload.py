"""What is simulated: the tokens of a trace as calls, with the predictions that each policy would have had."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from foregate.errors import ForegateError
from foregate.lookahead.gates import LookaheadGates
from foregate.lookahead.samples import gate_layers
from foregate.lookahead.tape import Rows, next_router_tape, tape
from foregate.lookahead.trace import Trace
from foregate.schedule import GATES, NEXT_ROUTER, Call, Route, Shape, told_by


@dataclass(frozen=True)
class Workload:
    """Rows of a trace, in the order in which they are decoded. Raises ForegateError if the gates are of another model."""

    trace: Trace
    gates: LookaheadGates | None
    rows: Rows

    def __post_init__(self) -> None:
        if self.gates is not None and self.gates.header.layers != gate_layers(self.trace):
            raise ForegateError(f"the gates are of another model than {self.trace.path}: name those of its own model")

    @cached_property
    def shape(self) -> Shape:
        layers = self.trace.layers
        return Shape(tuple(layer.num_experts for layer in layers), tuple(layer.top_k for layer in layers))

    @property
    def num_experts(self) -> int:
        """Over all layers."""
        return sum(self.shape.experts)

    def calls(self, policy: str) -> list[Call]:
        """The calls with what `policy` would be told. Raises ForegateError if that takes gates and there are none."""
        source = told_by(policy)
        if source == GATES:
            if self.gates is None:
                raise ForegateError(f"policy {policy} needs gates: name them with --gates, or --gates untrained")
            return self._foreseen
        return self._guessed if source == NEXT_ROUTER else self._plain

    @cached_property
    def future(self) -> Sequence[Route]:
        """Every choice to come, for the bounds."""
        return [(call.layer, call.experts) for call in self._plain]

    @cached_property
    def _plain(self) -> list[Call]:
        return tape(self.trace, None, self.rows)

    @cached_property
    def _guessed(self) -> list[Call]:
        return next_router_tape(self.trace, self.rows)

    @cached_property
    def _foreseen(self) -> list[Call]:
        return tape(self.trace, self.gates, self.rows)
