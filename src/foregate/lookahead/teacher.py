"""What a gate learns to say for one target: logits whose top k are the experts the layer really used.

Most routers choose the top k of their scores; then the scores themselves are the teacher. Others add a bias per expert,
look at groups of experts first, or look the choice up. For them an offset per expert is fitted by which the scores agree
best with the choice, and in rows that still differ, scores on the wrong side of the boundary are moved across it.
"""

from dataclasses import dataclass
from typing import Self

import torch

from foregate.lookahead.metrics import chosen_mask

OFFSET_ROUNDS = 200


@dataclass(frozen=True)
class Teacher:
    """Turns scores and choice of one MoE layer into the logits a gate should give."""

    chooses_by_scores: bool  # the top k of the scores are the choice, in all rows it was fitted to
    offset: torch.Tensor  # float32 [num_experts]
    margin: float  # between the boundary and a score that was moved across it

    @classmethod
    def fit(cls, scores: torch.Tensor, chosen: torch.Tensor) -> Self:
        """scores: float32 [rows, num_experts]; chosen: int64 [rows, k]."""
        mask = chosen_mask(chosen, scores.shape[1])
        offset, spread, size = torch.zeros_like(scores[0]), float(scores.std(dim=1).mean()), scores.shape[1]
        for turn in range(OFFSET_ROUNDS):
            lowest, highest = _edges(scores + offset, mask)
            wrong = lowest.values < highest.values
            if not wrong.any():
                break
            pull = torch.bincount(lowest.indices[wrong], minlength=size)
            pull = pull - torch.bincount(highest.indices[wrong], minlength=size)
            offset = offset + spread * (1 - turn / OFFSET_ROUNDS) * pull / len(scores)
        lowest, highest = _edges(scores + offset, mask)
        gaps = (lowest.values - highest.values).abs()
        gaps = gaps[gaps.isfinite()]
        return cls(not offset.any(), offset, float(gaps.mean()) / 2 if len(gaps) else 0.0)

    def __call__(self, scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """The logits to learn: float32 [rows, num_experts]."""
        if self.chooses_by_scores:
            return scores
        mask = chosen_mask(chosen, scores.shape[1])
        logits = scores + self.offset
        lowest, highest = (edge.values.unsqueeze(1) for edge in _edges(logits, mask))
        middle = (lowest + highest) / 2
        moved = torch.where(mask, logits.maximum(middle + self.margin), logits.minimum(middle - self.margin))
        return torch.where(lowest < highest, moved, logits)


def _edges(logits: torch.Tensor, mask: torch.Tensor) -> tuple[torch.return_types.min, torch.return_types.max]:
    """The lowest logit of the chosen experts and the highest of the others, by row, with their experts."""
    return logits.masked_fill(~mask, torch.inf).min(dim=1), logits.masked_fill(mask, -torch.inf).max(dim=1)
