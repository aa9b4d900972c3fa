"""Other forms of lookahead gates than the product's, and other losses: what benchmarks/gate_ablation.py compares."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from foregate.config import AlignConfig
from foregate.lookahead.fit import FALL_OFF, FAR_WEIGHT, STATISTICS_ROWS, evenly
from foregate.lookahead.gate import LookaheadGate, boundary
from foregate.lookahead.metrics import chosen_mask
from foregate.lookahead.samples import SourceSamples, hits
from foregate.lookahead.teacher import Teacher

JUDGED_ROWS = 8192  # after each epoch
CHUNK_ROWS = 4096
RIDGE = 1e-3  # of the mean variance of an input
RANK_PAIRS = 2  # weakest chosen and strongest other experts that the ranking loss compares


@dataclass(frozen=True)
class Form:
    """A gate's form and how it is trained. The defaults are the product's, but for the width."""

    width: int
    routers: str = "frozen"  # the targets' routers as a part of it: frozen, learned (trained on) or none
    activation: bool = True  # without: a linear correction of rank `width`
    recent: bool = True  # whether it sees the targets' latest router scores
    earlier: bool = False  # whether it sees the targets' latest router inputs too
    loss: str = "weighted mse"
    dropout: float = 0.0
    weight_decay: float = 0.0
    epochs: int = AlignConfig.epochs
    rate: float = AlignConfig.learning_rate


@dataclass(frozen=True)
class Data:
    """What a gate of one source sees and should say, row by row."""

    source: torch.Tensor  # float32 [rows, input]
    recent: torch.Tensor  # float32 [rows, outputs]
    earlier: torch.Tensor | None  # bfloat16 [rows, inputs of all targets]
    wanted: torch.Tensor  # float32 [rows, outputs]
    chosen: torch.Tensor  # int64 [targets, rows, k]

    @classmethod
    def of(cls, samples: SourceSamples, rows: torch.Tensor, *, earlier: bool = False) -> "Data":
        """Read rows of a trace whose targets all have as many experts and the same k."""
        some = evenly(samples.training, STATISTICS_ROWS)
        teachers = map(Teacher.fit, samples.scores(some), samples.chosen(some))
        chosen = samples.chosen(rows)
        wanted = [teach(*pair) for teach, *pair in zip(teachers, samples.scores(rows), chosen, strict=True)]
        before = _latest_inputs(samples, rows) if earlier else None
        return cls(samples.source(rows), samples.recent(rows), before, torch.cat(wanted, 1), torch.stack(chosen))

    def batches(self, order: torch.Tensor, size: int) -> Iterator["Data"]:
        for rows in order.split(size):
            earlier = None if self.earlier is None else self.earlier[rows]
            yield Data(self.source[rows], self.recent[rows], earlier, self.wanted[rows], self.chosen[:, rows])

    def __len__(self) -> int:
        return len(self.source)


def _latest_inputs(samples: SourceSamples, rows: torch.Tensor) -> torch.Tensor:
    first = torch.zeros(samples.trace.num_tokens, dtype=torch.bool)
    first[[sequence.start for sequence in samples.trace.sequences]] = True
    parts = []
    for target in samples.targets:
        inputs = samples.trace.inputs(target.layer)
        if target.next_token:
            parts.append(inputs[rows])
        else:
            parts.append(inputs[(rows - 1).clamp_min(0)].masked_fill(first[rows].unsqueeze(1), 0.0))
    return torch.cat(parts, 1)


class Variant(nn.Module):
    """A gate of any Form: routers with a factor for every input, a bias, and a correction."""

    def __init__(self, form: Form, untrained: LookaheadGate, data: Data) -> None:
        super().__init__()
        self.form, self.targets = form, len(untrained.sizes)
        base = untrained.base.detach().clone()
        base = base if form.routers != "none" else torch.zeros_like(base)
        self.base = nn.Parameter(base, requires_grad=form.routers == "learned")
        every = torch.arange(len(data))
        inputs = self._inputs(next(data.batches(evenly(every, STATISTICS_ROWS), STATISTICS_ROWS)))
        spread = inputs.std(0)
        self.register_buffer("mean", inputs.mean(0))
        self.register_buffer("spread", spread.clamp_min(float(spread.mean()) / 100))
        self.factors = nn.Parameter(torch.ones(self.targets, base.shape[1]), requires_grad=form.routers == "frozen")
        self.bias = nn.Parameter(data.wanted.mean(0) - data.source.mean(0) @ base.T)
        self.down = nn.Linear(inputs.shape[1], form.width)
        self.drop = nn.Dropout(form.dropout)
        self.up = nn.Linear(form.width, len(base), bias=False)
        nn.init.zeros_(self.up.weight)

    def _inputs(self, batch: Data) -> torch.Tensor:
        parts = [batch.source]
        if self.form.recent:
            parts.append(batch.recent)
        if self.form.earlier:
            parts.append(batch.earlier.float())
        return torch.cat(parts, 1)

    def forward(self, batch: Data) -> torch.Tensor:
        """Logits [rows, outputs]."""
        inner = self.down((self._inputs(batch) - self.mean) / self.spread)
        correction = self.up(self.drop(functional.silu(inner) if self.form.activation else inner))
        if self.form.routers == "none":
            return self.bias + correction
        scaled = (self.base.view(self.targets, -1, self.base.shape[1]) * self.factors[:, None]).flatten(0, 1)
        return functional.linear(batch.source, scaled, self.bias) + correction

    @property
    def learned(self) -> int:
        """Parameters learned, two for each target's probabilities included."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad) + 2 * self.targets

    @property
    def multiplications(self) -> int:
        """Multiply-adds a token."""
        routers = self.base.numel() if self.form.routers != "none" else 0
        return routers + self.down.weight.numel() + self.up.weight.numel()


def loss_of(name: str, logits: torch.Tensor, batch: Data) -> torch.Tensor:
    """The loss `name` of logits [rows, outputs]."""
    targets, rows, k = batch.chosen.shape
    z, wanted = (value.view(rows, targets, -1) for value in (logits, batch.wanted))
    kind, _, ranking = name.partition("+")
    mask = None
    if ranking or kind in ("bce", "ce"):
        mask = torch.stack([chosen_mask(chosen, z.shape[-1]) for chosen in batch.chosen], 1)
    if kind == "weighted mse":
        spread = wanted.std(-1, keepdim=True, correction=0).clamp_min(1e-6)
        weights = torch.exp(-FALL_OFF * (wanted - boundary(wanted, k)).abs() / spread) + FAR_WEIGHT
        loss = (weights * (z - wanted).square()).sum() / weights.sum()
    elif kind == "mse":
        loss = functional.mse_loss(z, wanted)
    elif kind == "bce":
        loss = functional.binary_cross_entropy_with_logits(z, mask.float())
    elif kind == "ce":
        loss = -(z.log_softmax(-1) * mask).sum(-1).mean() / k
    elif kind == "kl":
        loss = -(wanted.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()
    else:
        raise ValueError(name)
    if ranking:
        weakest = z.masked_fill(~mask, 1e4).topk(min(k, RANK_PAIRS), -1, largest=False).values
        strongest = z.masked_fill(mask, -1e4).topk(RANK_PAIRS, -1).values
        loss = loss + functional.softplus(strongest[..., None, :] - weakest[..., :, None]).mean()
    return loss


@torch.no_grad()
def recall_of(logits: torch.Tensor, chosen: torch.Tensor) -> list[float]:
    """By target. logits [rows, outputs]; chosen int64 [targets, rows, k]."""
    parts = logits.chunk(len(chosen), 1)
    counts = [hits(part, wanted, chosen.shape[2]) for part, wanted in zip(parts, chosen, strict=True)]
    return [found / real for found, real in counts]


@torch.no_grad()
def judge(net: Variant, data: Data) -> list[float]:
    """Recall by target."""
    net.eval()
    logits = torch.cat([net(batch) for batch in data.batches(torch.arange(len(data)), CHUNK_ROWS)])
    net.train()
    return recall_of(logits, data.chosen)


def fit_variant(form: Form, untrained: LookaheadGate, training: Data, validation: Data) -> Variant:
    """Train as the product does: one cycle of the learning rate, and the best epoch on validation rows is kept."""
    torch.manual_seed(0)
    net = Variant(form, untrained, training)
    learned = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, form.rate, weight_decay=form.weight_decay)
    size = AlignConfig.batch
    steps = form.epochs * -(-len(training) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, form.rate, total_steps=steps + 1, pct_start=0.1)
    judged = next(validation.batches(evenly(torch.arange(len(validation)), JUDGED_ROWS), JUDGED_ROWS))
    best, best_state = -1.0, {}
    for _ in range(form.epochs):
        for batch in training.batches(torch.randperm(len(training)), size):
            loss = loss_of(form.loss, net(batch), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        found = sum(judge(net, judged))
        if found > best:
            best, best_state = found, {name: value.clone() for name, value in net.state_dict().items()}
    net.load_state_dict(best_state)
    return net


def ridge(inputs: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight [inputs, outputs], bias) of the linear map by ridge regression."""
    mean, wanted_mean = inputs.mean(0), wanted.mean(0)
    spread = inputs.std(0).clamp_min(1e-6)
    scaled = (inputs - mean) / spread
    damping = RIDGE * torch.eye(scaled.shape[1])
    weight = torch.linalg.solve(
        scaled.T @ scaled / len(scaled) + damping, scaled.T @ (wanted - wanted_mean) / len(scaled)
    )
    weight = weight / spread[:, None]
    return weight, wanted_mean - mean @ weight
