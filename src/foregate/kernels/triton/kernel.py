"""The Triton kernels as a layer's kernel on slots."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import nn
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from foregate.checkpoint.store import RecordLayout
from foregate.errors import ForegateError
from foregate.kernels.cpu import Activation
from foregate.kernels.slots.base import Rows, SlotKernel
from foregate.kernels.slots.reference import SlotReference
from foregate.kernels.triton import decode, grouped
from foregate.kernels.triton.configs import COLUMNS, Config, Decode, Grouped, candidates, card_name
from foregate.kernels.triton.record import RecordPlaces

REFUSED = (OutOfResources, PTXASError, CompilationError)  # what a card cannot do


class TritonKernel(SlotKernel):
    """Decode: one launch for gate and up, one for down and the weighted sum. Prompts: one for each matrix.

    activation: what the experts compute between their matrices. places: where the matrices lie. A configuration that the
    card refuses is replaced by the next; when none is left, the reference computes, and `note` says so.
    """

    name = "triton"

    def __init__(
        self,
        experts: nn.Module,
        layout: RecordLayout,
        slots: torch.Tensor,
        activation: Activation,
        places: RecordPlaces,
    ) -> None:
        super().__init__(experts, layout, slots)
        self._activation, self._places = activation, places
        self._card = card_name(slots.device)
        self._reference: dict[type[Config], SlotReference] = {}  # in the place of what the card cannot do
        self._chosen: dict[type[Config], tuple[Config, Config]] = {}  # for the two matrices
        self._left = {kind: self._pairs(kind) for kind in (Decode, Grouped)}
        for kind in (Decode, Grouped):
            self._next(kind, None)

    @property
    def note(self) -> str:
        def part(kind: type[Config]) -> str:
            if kind in self._reference:
                return f"{kind.__name__.lower()} on {self._reference[kind].note}"
            return ", ".join(map(str, self._chosen[kind]))

        return f"triton {triton.__version__}: {part(Decode)}; {part(Grouped)}"

    def run(self, hidden: torch.Tensor, rows: Rows, outputs: torch.Tensor, grouped: bool) -> None:
        self._check(hidden, outputs)
        if not len(rows.slots):
            return
        way, steps = (Grouped, self._run_grouped) if grouped else (Decode, self._run_each)
        if not self._attempt(way, lambda: steps(hidden, rows, outputs)):
            self._reference[way].run(hidden, rows, outputs, grouped)

    def combine(self, outputs: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, total: torch.Tensor) -> None:
        if Decode in self._reference:
            self._reference[Decode].combine(outputs, slots, weights, total)
            return
        tokens, top_k = slots.shape
        constants = {"TOP_K": top_k, "HIDDEN": total.shape[1], "ROWS": COLUMNS}
        grid = (tokens, triton.cdiv(total.shape[1], COLUMNS))
        decode.weighted_sum[grid](outputs, slots, weights, total, **constants, enable_fp_fusion=False)

    def decode(self, hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, total: torch.Tensor) -> None:
        self._check(hidden, total)
        if not len(slots):
            return
        apart = Decode in self._reference or self._chosen[Decode][1].apart
        if apart or not self._attempt(Decode, lambda: self._run_sum(hidden, slots, weights, total)):
            super().decode(hidden, slots, weights, total)

    def prepare(self, dtype: torch.dtype, top_k: int) -> None:
        device, size = self.slots.device, self._places.up.cols
        hidden, outputs = torch.zeros(1, size, dtype=dtype, device=device), torch.zeros(top_k, size, device=device)
        none, weights = (
            torch.full((1, top_k), -1, dtype=torch.int32, device=device),
            torch.zeros(1, top_k, device=device),
        )
        rows = Rows(none.view(-1), decode.tokens_of_rows(1, top_k, device), decode.tokens_of_rows(top_k, 1, device))
        for kind in (Decode, Grouped):
            tried = None
            while tried != self._chosen[kind]:  # again from the start with another configuration
                tried = self._chosen[kind]
                self.run(hidden, rows, outputs, grouped=kind is Grouped)
                if kind is Decode:
                    self.decode(hidden, none, weights, hidden)

    def use(self, kind: type[Config], up: Config, down: Config) -> None:
        """Use these configurations and no other, as tuning does. Results may round otherwise than before."""
        self._reference.pop(kind, None)
        self._chosen[kind] = (up, down)
        self._left[kind] = iter(())

    def chosen(self, kind: type[Config]) -> tuple[Config, Config] | None:
        """The configurations in use for the two matrices; None where the reference computes."""
        return None if kind in self._reference else self._chosen[kind]

    def _run_each(self, hidden: torch.Tensor, rows: Rows, outputs: torch.Tensor) -> None:
        inner, down = self._decode_up(hidden, rows.slots, rows.tokens), self._chosen[Decode][1]
        self._launch(decode.decode_down, down, len(rows.slots), rows.slots, rows.places, inner, outputs)

    def _run_sum(self, hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, total: torch.Tensor) -> None:
        tokens, top_k = slots.shape
        row_tokens = decode.tokens_of_rows(tokens, top_k, slots.device)
        inner, down = self._decode_up(hidden, slots, row_tokens), self._chosen[Decode][1]
        self._launch(decode.decode_down_sum, down, tokens, slots, weights, inner, total, TOP_K=top_k)

    def _decode_up(self, hidden: torch.Tensor, slots: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Inner values in the code order of the down matrix."""
        up, down = self._places.up, self._places.down
        x = decode.code_order(hidden, up.parts)
        inner = decode.code_order_like(slots.numel(), down.cols, down.parts, hidden.device)
        config, constants = self._chosen[Decode][0], {**self._gate(), "NEXT_PARTS": down.parts}
        self._launch(decode.decode_up, config, slots.numel(), slots, tokens, x, inner, **constants)
        return inner

    def _run_grouped(self, hidden: torch.Tensor, rows: Rows, outputs: torch.Tensor) -> None:
        up, down = self._chosen[Grouped]
        order, starts = grouped.tiles(rows.slots, len(self.slots), up.tokens)
        inner = hidden.new_empty(len(order), self._places.down.cols)
        shared = (order, starts)
        tiles = len(starts) - 1
        self._launch(grouped.grouped_up, up, tiles, rows.slots, rows.tokens, *shared, hidden, inner, **self._gate())
        self._launch(grouped.grouped_down, down, tiles, rows.slots, rows.places, *shared, inner, outputs)

    def _launch(self, kernel: Any, config: Config, count: int, *arguments: torch.Tensor, **constants: Any) -> None:
        """Launch over `count` rows, tiles or tokens and all rows of the matrix."""
        matrix = self._places.up if "LAYOUT" in constants else self._places.down
        constants |= matrix.constants()
        if matrix is self._places.down:
            constants["HIDDEN"] = matrix.rows
        options: dict[str, Any] = {"ROWS": config.rows, "num_warps": config.warps}
        if isinstance(config, Decode):  # without fusion it is written down what is rounded, in every kernel alike
            options |= {"WIDE": config.wide, "STAGES": config.stages, "enable_fp_fusion": False}
        else:
            options |= {"TOKENS": config.tokens, "num_stages": config.stages}
        grid = (count, triton.cdiv(matrix.rows, config.rows))
        kernel[grid](self.slots, self.slots.stride(0), *arguments, **constants, **options)

    def _gate(self) -> dict[str, Any]:
        names = ("layout", "function", "alpha", "limit", "up_offset")
        gate = {name.upper(): getattr(self._activation, name) for name in names}
        return {**gate, "INNER": self._places.down.cols}

    def _attempt(self, kind: type[Config], launch: Callable[[], None]) -> bool:
        """Launch with the best configuration that the card takes; False when only the reference is left."""
        while kind not in self._reference:
            try:
                launch()
                return True
            except REFUSED as error:
                self._next(kind, error)
        return False

    def _next(self, kind: type[Config], error: Exception | None) -> None:
        pair = next(self._left[kind], None)
        if pair is None:
            reason = f"{self._card} refuses every configuration: {str(error).splitlines()[0]}"
            self._reference[kind] = SlotReference(self.experts, self.layout, self.slots, reason)
        else:
            self._chosen[kind] = pair

    def _pairs(self, kind: type[Config]) -> Iterator[tuple[Config, Config]]:
        """Configurations for both matrices. Tiles of tokens are shared: the down matrix takes those of the first."""
        up, down = (candidates(kind, matrix, self.slots.device) for matrix in (self._places.up, self._places.down))
        for first, second in zip(up, down, strict=False):
            yield first, second if kind is Decode else Grouped(first.tokens, second.rows, second.warps, second.stages)

    def _check(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            if tensor.device != self.slots.device or not tensor.is_contiguous():
                raise ForegateError(
                    f"the Triton kernels need contiguous tensors on {self.slots.device}, not on {tensor.device}"
                )
