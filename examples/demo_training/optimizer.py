"""Muon for the matrices inside the layers, AdamW for everything else.

Muon follows the momentum's nearest orthogonal matrix, found by Newton-Schulz
iterations.  It takes about a tenth of a step's time on these models.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

MUON_RATE, MUON_MOMENTUM, MUON_DECAY = 0.02, 0.95, 0.1
ADAM_RATE, ADAM_BETAS, ADAM_EPS = 3e-3, (0.9, 0.95), 1e-8
# The quintic of Jordan et al. 2024: singular values land between 0.7 and 1.2.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


class Optimizer:
    """Both methods over one model; its state is a flat dictionary of tensors."""

    def __init__(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        self.muon = {name: p for name, p in parameters.items() if uses_muon(name, p)}
        self.adam = {name: p for name, p in parameters.items() if name not in self.muon}
        self.state: dict[str, Tensor] = {f"momentum.{name}": torch.zeros_like(p) for name, p in parameters.items()}
        self.state |= {f"square.{name}": torch.zeros_like(p) for name, p in self.adam.items()}

    @torch.no_grad()
    def step(self, number: int, rate: float) -> None:
        """One step; ``rate`` (0 to 1) scales both learning rates, ``number`` counts from 1."""
        for name, p in self.adam.items():
            mean, square = self.state[f"momentum.{name}"], self.state[f"square.{name}"]
            mean.lerp_(p.grad, 1 - ADAM_BETAS[0])
            square.lerp_(p.grad.square(), 1 - ADAM_BETAS[1])
            root = (square / (1 - ADAM_BETAS[1] ** number)).sqrt_().add_(ADAM_EPS)
            p.addcdiv_(mean, root, value=-rate * ADAM_RATE / (1 - ADAM_BETAS[0] ** number))
        for targets, updates in self._muon_groups():
            directions = orthogonalize(torch.cat(updates)).split([len(u) for u in updates])
            # A tall matrix moves further, so that every output changes equally much.
            scale = max(1.0, updates[0].shape[1] / updates[0].shape[2]) ** 0.5
            for target, direction in zip(targets, directions, strict=True):
                target.mul_(1 - rate * MUON_RATE * MUON_DECAY)
                target.add_(direction.view_as(target), alpha=-rate * MUON_RATE * scale)

    def _muon_groups(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Parameters and their Nesterov updates as stacks of matrices, grouped by shape."""
        groups: dict[torch.Size, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for name, p in self.muon.items():
            momentum = self.state[f"momentum.{name}"]
            momentum.lerp_(p.grad, 1 - MUON_MOMENTUM)
            update = p.grad.lerp(momentum, MUON_MOMENTUM)
            # Gate and up are two matrices, though they are stored as one.
            rows = p.shape[-2] // (2 if name.endswith("gate_up") else 1)
            update = update.reshape(-1, rows, p.shape[-1])
            targets, updates = groups[update.shape[1:]]
            targets.append(p)
            updates.append(update)
        return list(groups.values())


def uses_muon(name: str, parameter: Tensor) -> bool:
    """Whether Muon trains this parameter: matrices of layers, but not routers."""
    return parameter.dim() >= 2 and name.startswith("layers.") and not name.endswith("router")


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearly nearest orthogonal matrix of each in the stack (count, rows, columns)."""
    x = matrices.bfloat16()
    transposed = x.shape[1] > x.shape[2]
    if transposed:
        x = x.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.transpose(1, 2)
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return (x.transpose(1, 2) if transposed else x).float()
