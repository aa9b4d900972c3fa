"""What a kernel is: it computes some experts of one MoE layer, straight from their records."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from foregate.checkpoint.store import Weight

Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Work:
    """One expert and where its tokens are.

    expert: what the kernel's `prepare` made of its parameters. tokens: int64 [n], rows of the input. places: int64 [n],
    rows of the output, all different within a call.
    """

    expert: Any
    tokens: torch.Tensor
    places: torch.Tensor


class Kernel(ABC):
    """The experts of one MoE layer.

    experts: the family's module, which says how gate and up combine. exact: keep activations in float32 where the kernel
    could round them. A token's result does not depend on the other tokens of a call, bit for bit.
    """

    name: ClassVar[str]

    def __init__(self, experts: nn.Module, exact: bool) -> None:
        self.experts, self.exact = experts, exact

    @property
    def way(self) -> Hashable:
        """What `prepare` depends on beside the weights: layers of one way and one layout may share what it has made."""
        return type(self)

    @abstractmethod
    def prepare(self, weights: dict[str, Weight]) -> Any:
        """An expert as `run` takes it, from views of a slot: made once, right for whatever record the slot holds."""

    @abstractmethod
    def run(self, hidden: torch.Tensor, work: Sequence[Work], outputs: torch.Tensor) -> None:
        """outputs[places] = expert(hidden[tokens]) for every piece of work; other rows stay.

        hidden: float32 [tokens, hidden], contiguous; outputs: float32 [places, hidden].
        """

    @staticmethod
    @abstractmethod
    def product(matrix: Weight, exact: bool) -> Product:
        """The product with a matrix [out, in] as a function: x @ matrix.T, float32 [tokens, out], for x float32
        [tokens, in], contiguous. Rows do not depend on each other, as above.
        """
