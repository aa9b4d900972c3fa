"""How well scores of experts agree with the experts that were used. Every metric is a ratio of two counts.

Throughout, logits (or probabilities) are float [tokens, num_experts], and chosen is int64 [tokens, k], where an index
outside 0..num_experts-1 is no expert and counts nowhere.
"""

from typing import NamedTuple

import torch


class Ratio(NamedTuple):
    """`part` of `whole`. Ratios of different tokens add up to the ratio over all of them."""

    part: float
    whole: float

    @property
    def value(self) -> float | None:
        """None where there is nothing to count."""
        return self.part / self.whole if self.whole else None

    def plus(self, other: "Ratio") -> "Ratio":
        return Ratio(self.part + other.part, self.whole + other.whole)


class Ranking:
    """Where the chosen experts stand when the experts of each token are ordered by their logits.

    Of equal logits the one of the lower index stands first. NaN never helps: it stands last for a chosen expert and
    first for another.
    """

    def __init__(self, logits: torch.Tensor, chosen: torch.Tensor) -> None:
        self.real = is_expert(chosen, logits.shape[1])
        index = chosen.clamp(0, logits.shape[1] - 1)
        own = logits.gather(1, index).unsqueeze(2)  # [tokens, k, 1]
        every = logits.unsqueeze(1)
        before = torch.arange(logits.shape[1]) < index.unsqueeze(2)
        self._above = (~(every <= own)).sum(2)
        equal = every == own
        self._ranks = self._above + (equal & before).sum(2)  # 0 is the best
        self._equal = equal.sum(2)  # itself included
        self._own = own.squeeze(2)
        self._experts = logits.shape[1]

    def recall(self, m: int) -> Ratio:
        """Chosen experts among the m best."""
        return Ratio(int(((self._ranks < m) & self.real).sum()), int(self.real.sum()))

    def exact_sets(self) -> Ratio:
        """Tokens whose n chosen experts are exactly the n best, of those that chose any."""
        wanted = self.real.sum(1)
        found = ((self._ranks < wanted.unsqueeze(1)) & self.real).sum(1)
        return Ratio(int(((found == wanted) & (wanted > 0)).sum()), int((wanted > 0).sum()))

    def auc(self) -> Ratio:
        """Pairs of a chosen and another expert of the same token in the right order; equal logits count half."""
        rivals = self.real.unsqueeze(1)
        above = self._above - (~(self._own.unsqueeze(1) <= self._own.unsqueeze(2)) & rivals).sum(2)
        equal = self._equal - ((self._own.unsqueeze(1) == self._own.unsqueeze(2)) & rivals).sum(2)
        others = (self._experts - self.real.sum(1, keepdim=True)).expand_as(self.real)
        right = (others - above - 0.5 * equal)[self.real]
        return Ratio(float(right.sum()), int(others[self.real].sum()))


def is_expert(chosen: torch.Tensor, num_experts: int) -> torch.Tensor:
    """bool [tokens, k]: which of the chosen indices are experts."""
    return (chosen >= 0) & (chosen < num_experts)


def chosen_mask(chosen: torch.Tensor, num_experts: int) -> torch.Tensor:
    """bool [tokens, num_experts]: which experts each token chose. chosen: int64 [tokens, k]; an index outside is none."""
    columns = chosen.masked_fill(~is_expert(chosen, num_experts), num_experts)
    mask = torch.zeros(len(chosen), num_experts + 1, dtype=torch.bool, device=chosen.device)
    return mask.scatter_(1, columns, True)[:, :num_experts]


def recall_at(logits: torch.Tensor, chosen: torch.Tensor, m: int) -> Ratio:
    """Chosen experts among the m of the highest logits."""
    return Ranking(logits, chosen).recall(m)


def exact_set_rate(logits: torch.Tensor, chosen: torch.Tensor) -> Ratio:
    """Tokens whose n chosen experts are exactly the n of the highest logits, of those that chose any."""
    return Ranking(logits, chosen).exact_sets()


def auc(logits: torch.Tensor, chosen: torch.Tensor) -> Ratio:
    """How probable it is that a chosen expert scores above another one of the same token; equal logits count half."""
    return Ranking(logits, chosen).auc()


def precision_at(probabilities: torch.Tensor, chosen: torch.Tensor, threshold: float) -> Ratio:
    """Of the experts given at least this probability, those that were chosen."""
    mask, sure = chosen_mask(chosen, probabilities.shape[1]), probabilities >= threshold
    return Ratio(int((mask & sure).sum()), int(sure.sum()))


def covered_at(probabilities: torch.Tensor, chosen: torch.Tensor, threshold: float) -> Ratio:
    """Of the chosen experts, those that were given at least this probability."""
    mask = chosen_mask(chosen, probabilities.shape[1])
    return Ratio(int((mask & (probabilities >= threshold)).sum()), int(mask.sum()))


def calibration_bins(probabilities: torch.Tensor, chosen: torch.Tensor, bins: int) -> torch.Tensor:
    """float64 [3, bins]: predictions, sum of their probabilities, and experts chosen, by bins of equal width in 0..1.

    Bins of different tokens add up.
    """
    flat = probabilities.flatten().double()
    index = (flat * bins).long().clamp(0, bins - 1)
    chosen_flat = chosen_mask(chosen, probabilities.shape[1]).flatten().double()
    values = (torch.ones_like(flat), flat, chosen_flat)
    return torch.stack([torch.zeros(bins, dtype=torch.float64).index_add_(0, index, value) for value in values])


def expected_calibration_error(bins: torch.Tensor) -> float | None:
    """Mean distance between probability and outcome over the bins of `calibration_bins`, weighted by predictions.

    None where nothing was predicted.
    """
    predictions, expected, observed = bins
    return float((expected - observed).abs().sum() / predictions.sum()) if predictions.any() else None
