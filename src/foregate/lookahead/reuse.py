"""Reuse heads: whether an expert of a layer is used again within the next tokens, for eviction.

A head reads the router's input through a few hidden values, and for each expert its latest score and how often and how
recently it was used; the weights of the latter are shared by all experts. benchmarks/reuse_head.py is the evidence that
it beats decayed frequency.
"""

import torch
from torch import nn
from torch.nn import functional

from foregate.lookahead.metrics import chosen_mask

WINDOWS = (1, 4, 16)  # tokens ahead
HALF_LIVES = (2.0, 8.0, 32.0)  # tokens, of the decayed frequencies it sees
FEATURES = len(HALF_LIVES) + 2  # of each expert: decayed frequencies, time since the last use, score
NEVER = 1e4  # tokens: the age of an expert that was not used yet
BLOCK = 256  # rows of the history computed at once
PART = 65536  # rows after which training forgets the history, to save memory
HALF = 2  # bytes of a feature while training
HISTORY_BYTES = 512 << 20  # of features and labels: as many rows are learned from
EPOCHS, BATCH, RATE = 4, 512, 3e-3
LEAST_STEPS = 250  # short traces are read more often


class UseHistory:
    """Decayed frequencies and ages of one layer's experts, token by token."""

    def __init__(self, num_experts: int) -> None:
        self.decayed = torch.zeros(len(HALF_LIVES), num_experts)
        self.age = torch.full((num_experts,), NEVER)

    def observe(self, used: torch.Tensor) -> None:
        """used: bool [num_experts], by the newest token."""
        self.decayed = self.decayed * _decay()[:, None] + used
        self.age = torch.where(used, 0.0, self.age + 1)

    def features(self, scores: torch.Tensor) -> torch.Tensor:
        """float32 [FEATURES, num_experts]; scores: float32 [num_experts], of the newest token."""
        return _features(self.decayed[None], self.age[None], scores[None])[0]


class ReuseHead(nn.Module):
    """The head of one MoE layer; width: hidden values."""

    def __init__(self, input_size: int, num_experts: int, width: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.down = nn.Parameter(torch.zeros(width, input_size))
        self.down_bias = nn.Parameter(torch.zeros(width))
        self.up = nn.Parameter(torch.zeros(len(WINDOWS) * num_experts, width))
        self.bias = nn.Parameter(torch.zeros(len(WINDOWS) * num_experts))
        self.shared = nn.Parameter(torch.zeros(len(WINDOWS), FEATURES))

    def forward(self, hidden: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """hidden: float32 [tokens, input_size], the router's input; features: [tokens, FEATURES, num_experts].

        Returns logits [tokens, windows, num_experts] of the probability that the expert is used within the window.
        """
        inner = functional.silu(functional.linear(hidden, self.down, self.down_bias))
        own = functional.linear(inner, self.up, self.bias).view(-1, len(WINDOWS), self.num_experts)
        return own + torch.einsum("wf,tfe->twe", self.shared, features)


def history_features(used: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """`UseHistory.features` after each row: float32 [tokens, FEATURES, num_experts].

    used: bool [tokens, num_experts]; scores: float32, the same shape.
    """
    tokens = torch.arange(len(used)).unsqueeze(1)
    last = torch.where(used, tokens, -1).cummax(0).values
    age = torch.where(last >= 0, tokens - last, NEVER + 1 + tokens).float()
    return _features(_decayed(used.float()), age, scores)


def reused(used: torch.Tensor) -> torch.Tensor:
    """Whether an expert is used by one of the next tokens, by window: bool [tokens, windows, num_experts]."""
    ahead = []
    for window in WINDOWS:
        padded = functional.pad(used.float().T[None], (0, window))
        ahead.append(functional.max_pool1d(padded, window, stride=1)[0].T[1 : len(used) + 1] > 0)
    return torch.stack(ahead, 1)


def fit_reuse_head(
    inputs: torch.Tensor, scores: torch.Tensor, chosen: torch.Tensor, width: int, seed: int
) -> ReuseHead:
    """A head fitted to a layer's rows in their order: inputs [tokens, input_size], router scores [tokens, num_experts],
    experts chosen [tokens, top_k]. The first rows are used, as many as HISTORY_BYTES hold the history of. The same result
    every time on the same machine."""
    rows = HISTORY_BYTES // (scores.shape[1] * (FEATURES * HALF + len(WINDOWS)))
    inputs, scores, chosen = inputs[:rows], scores[:rows], chosen[:rows]
    features, labels = _histories(scores, chosen)
    mean, spread = _mean_and_spread(inputs)
    generator = torch.Generator().manual_seed(seed)
    head = ReuseHead(inputs.shape[1], scores.shape[1], width)
    nn.init.normal_(head.down, std=inputs.shape[1] ** -0.5, generator=generator)
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=0.01)
    for _ in range(max(EPOCHS, LEAST_STEPS * BATCH // len(inputs))):
        for rows in torch.randperm(len(inputs), generator=generator).split(BATCH):
            logits = head((inputs[rows].float() - mean) / spread, features[rows].float())
            loss = functional.binary_cross_entropy_with_logits(logits, labels[rows].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():  # fold the standardization: the head reads plain inputs
        head.down.div_(spread)
        head.down_bias.sub_(head.down @ mean)
    return head.requires_grad_(False)


def _histories(scores: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(features float16, labels bool) of all rows, filled part by part: float32 would take twice the memory."""
    tokens, experts = scores.shape
    features = torch.empty(tokens, FEATURES, experts, dtype=torch.float16)
    labels = torch.empty(tokens, len(WINDOWS), experts, dtype=torch.bool)
    for rows in torch.arange(tokens).split(PART):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        used = chosen_mask(chosen[part].long(), experts)
        features[part] = history_features(used, scores[part].float())
        labels[part] = reused(used)
    return features, labels


def _decay() -> torch.Tensor:
    return 0.5 ** (1 / torch.tensor(HALF_LIVES))


def _features(decayed: torch.Tensor, age: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    score = scores - scores.mean(-1, keepdim=True)
    return torch.cat([decayed.log1p(), age.log1p().unsqueeze(1), score.unsqueeze(1)], 1)


def _decayed(used: torch.Tensor) -> torch.Tensor:
    """Sums of past uses, each weighted by decay ** age: float32 [tokens, half-lives, num_experts]."""
    steps = torch.arange(BLOCK)
    ages = steps.unsqueeze(1) - steps
    weights = torch.where(ages >= 0, _decay()[:, None, None] ** ages.clamp_min(0), 0.0)  # [half-lives, row, past row]
    carry, blocks = torch.zeros(len(HALF_LIVES), used.shape[1]), []
    for rows in used.split(BLOCK):
        size = len(rows)
        fading = _decay()[:, None] ** (steps[:size] + 1)
        block = weights[:, :size, :size] @ rows + fading.unsqueeze(2) * carry.unsqueeze(1)
        carry = block[:, -1]
        blocks.append(block.transpose(0, 1))
    return torch.cat(blocks)


def _mean_and_spread(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    sample = inputs[:: max(1, len(inputs) // 16384)].float()
    return sample.mean(0), sample.std(0, correction=0).clamp_min(1e-6)
