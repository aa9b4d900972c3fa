"""What a slot kernel is: it computes rows of one MoE layer from records that lie in the slots of a device's memory.

Where a `Kernel` is given prepared experts one by one, a slot kernel is given the number of a slot per row, on the
device: a layer whose experts are all resident needs no word from the host.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from foregate.checkpoint.store import RecordLayout


@dataclass(frozen=True)
class Rows:
    """Rows of work: hidden[tokens[i]] goes through the record in slots[i], the result to outputs[places[i]].

    All int32 [n], contiguous, on the device of the slots. A negative slot leaves the row's output alone. Places are all
    different within a call.
    """

    slots: torch.Tensor
    tokens: torch.Tensor
    places: torch.Tensor


class SlotKernel(ABC):
    """The experts of one MoE layer, from records in slots.

    experts: the family's module, which says how gate and up combine. layout: of the layer's records. slots: uint8
    [slots, slot_bytes], contiguous; records may be replaced between calls. A row's result depends on its token, its
    record and `grouped` alone, bit for bit: not on its slot, nor on the order or number of rows.
    """

    name: ClassVar[str]

    def __init__(self, experts: nn.Module, layout: RecordLayout, slots: torch.Tensor) -> None:
        self.experts, self.layout, self.slots = experts, layout, slots

    @property
    @abstractmethod
    def note(self) -> str:
        """How this kernel runs, for summary and report; what it could not do here, and what it does instead."""

    def prepare(self, dtype: torch.dtype, top_k: int) -> None:  # noqa: B027 - a kernel may have nothing to prepare
        """Make ready for hidden states of this dtype, k experts a token. To be called before anything is computed: what
        the device refuses shows here, and rounding does not change later.
        """

    @abstractmethod
    def run(self, hidden: torch.Tensor, rows: Rows, outputs: torch.Tensor, grouped: bool) -> None:
        """outputs[places] = expert(hidden[tokens]) for every row with a slot; other rows of `outputs` stay.

        hidden: bfloat16, float16 or float32 [tokens, hidden], contiguous; outputs: float32 [places, hidden],
        contiguous. grouped: share an expert's weights among its rows, for prompts; the two ways round differently, so
        all calls for one layer and step must choose alike. Sums are in float32.
        """

    @abstractmethod
    def combine(self, outputs: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, total: torch.Tensor) -> None:
        """total = sum over k of weights * outputs, in the order of k, without the places whose slot is negative.

        outputs: float32 [tokens * k, hidden]; slots: int32 [tokens, k]; weights: float32 [tokens, k]; total: any float
        dtype [tokens, hidden]; all contiguous.
        """

    def decode(self, hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, total: torch.Tensor) -> None:
        """`run`, not grouped, for all k experts of every token, and `combine`: bit for bit what the two compute.

        Arguments as theirs. The experts of negative slots add nothing.
        """
        tokens, top_k = slots.shape
        places = torch.arange(tokens * top_k, dtype=torch.int32, device=slots.device)
        outputs = torch.zeros(tokens * top_k, hidden.shape[1], device=hidden.device)
        self.run(hidden, Rows(slots.view(-1), places // top_k, places), outputs, grouped=False)
        self.combine(outputs, slots, weights, total)
