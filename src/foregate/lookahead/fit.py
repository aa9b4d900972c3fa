"""Fitting the gate of one source to a trace: a closed-form start, then training towards the routers' scores.

What is learned: for each target a factor for every value of the source (folded into the routers' own weights at the
end), a bias, and the MLP. Within the token, the loss is the squared distance to the scores by which the target layers
chose, which counts most for the experts near the boundary of the choice: an error there decides whether an expert is
taken. Of the next token it is the cross-entropy of the choice: which token follows is open, and the likeliest experts are
not those of the mean of the scores. Its logarithm is summed over the targets: else far targets, of which less can be
known, would take the shared MLP from the near ones.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from foregate.config import AlignConfig
from foregate.errors import ForegateError
from foregate.lookahead.gate import LookaheadGate, Target, boundary
from foregate.lookahead.metrics import calibration_bins, chosen_mask, expected_calibration_error
from foregate.lookahead.samples import SourceSamples, hits
from foregate.lookahead.teacher import Teacher

STATISTICS_ROWS = 16384  # for means, spreads and the teachers' offsets
RIDGE_ROWS = 65536
RIDGE = 1e-3  # of the mean variance of the source's values
JUDGED_ROWS = 8192  # of the validation rows, after every epoch and for the calibration
CHUNK_ROWS = 4096  # judged at once
GROUP_BYTES = 64 << 20  # of the source's values: rows are mixed within groups of so many, so that reading stays local
LEAST_SPREAD = 1e-2  # of the mean spread: what hardly varies is not blown up
FALL_OFF = 2.0  # of an expert's weight in the loss, per spread of a row's scores away from the boundary,
FAR_WEIGHT = 0.05  # down to this; at the boundary it is 1.05
LEAST_DISTANCE = 1e-4  # a target that is met this well no longer counts for more
NEWTON_STEPS = 50
PULL = 1e-3  # rows, and few: a stronger pull blunts the probabilities of gates that are sure
CALIBRATION_BINS = 15


@dataclass(frozen=True)
class FittedGate:
    """A gate and how it does on the validation rows, by target."""

    gate: LookaheadGate  # on the CPU, rounded to float16 as it is saved
    untrained_recall: tuple[float, ...]
    recall: tuple[float, ...]
    calibration_error: tuple[float, ...]  # expected, of the probabilities
    epoch: int  # of `epochs`, the best one; 0 is the closed-form start


def fit_gate(
    samples: SourceSamples, untrained: LookaheadGate, settings: AlignConfig, device: torch.device
) -> FittedGate:
    """Train the gate of one source from its untrained state; the same result every time on the same machine.

    Raises ForegateError when values grow beyond what float16 holds.
    """
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + samples.source_index)
    untrained = untrained.to(device)
    teachers = [
        Teacher.fit(scores.to(device), chosen.to(device))
        for scores, chosen in zip(*_at(samples, evenly(samples.training, STATISTICS_ROWS)), strict=True)
    ]
    model = _Trainable(samples, untrained, teachers, generator, device)
    judged = evenly(samples.validation, JUDGED_ROWS)
    best, best_epoch = model.folded(), 0
    best_recall = sum(recall(samples, best, judged, device))
    for epoch in _train(model, samples, teachers, settings, generator, device):
        gate = model.folded()
        found = sum(recall(samples, gate, judged, device))
        if found > best_recall:
            best, best_recall, best_epoch = gate, found, epoch
    gate = _rounded(best, samples)
    error = calibrate(samples, gate, device)
    gate = _rounded(gate, samples)
    return FittedGate(
        gate=gate.cpu(),
        untrained_recall=recall(samples, untrained, samples.validation, device),
        recall=recall(samples, gate.to(device), samples.validation, device),
        calibration_error=error,
        epoch=best_epoch,
    )


@torch.no_grad()
def recall(samples: SourceSamples, gate: LookaheadGate, rows: torch.Tensor, device: torch.device) -> tuple[float, ...]:
    """The share of the chosen experts among the gate's top k, by target; 1 where none was ever chosen."""
    found, real = [0] * len(samples.targets), [0] * len(samples.targets)
    for part in rows.split(CHUNK_ROWS):
        logits = gate.split(gate(samples.source(part).to(device), samples.recent(part).to(device)))
        for index, chosen in enumerate(samples.chosen(part)):
            hit, count = hits(logits[index], chosen.to(device), samples.top_k[index])
            found[index] += hit
            real[index] += count
    return tuple(hit / count if count else 1.0 for hit, count in zip(found, real, strict=True))


@torch.no_grad()
def calibrate(samples: SourceSamples, gate: LookaheadGate, device: torch.device) -> tuple[float, ...]:
    """Set scale and shift of every target to the likeliest on validation rows; returns the expected calibration errors."""
    rows = evenly(samples.validation, JUDGED_ROWS)
    parts: list[list[torch.Tensor]] = [[] for _ in samples.targets]
    for some in rows.split(CHUNK_ROWS):
        logits = gate.split(gate(samples.source(some).to(device), samples.recent(some).to(device)))
        for index, part in enumerate(logits):
            parts[index].append((part - boundary(part, samples.top_k[index])).cpu())
    errors = []
    for index, chosen in enumerate(samples.chosen(rows)):
        margins = torch.cat(parts[index]).double()
        scale, shift = logistic_fit(margins.flatten(), chosen_mask(chosen, margins.shape[1]).flatten().double())
        gate.scale[index], gate.shift[index] = scale, shift
        bins = calibration_bins(torch.sigmoid(scale * margins + shift), chosen, CALIBRATION_BINS)
        errors.append(expected_calibration_error(bins) or 0.0)
    return tuple(errors)


def logistic_fit(margins: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """(scale, shift) of sigmoid(scale * margin + shift) by Newton's method; float64 [n] each, wanted 0 or 1.

    A weak pull towards scale 1 (in units of the margins' spread) and shift 0 keeps separable data finite.
    """
    spread = float(margins.std()) if len(margins) > 1 else 0.0
    spread = spread or 1.0
    x = torch.stack([margins / spread, torch.ones_like(margins)])
    value = prior = torch.tensor([1.0, 0.0], dtype=torch.float64)
    pull = PULL * torch.eye(2, dtype=torch.float64)

    def loss(at: torch.Tensor) -> torch.Tensor:
        fit = functional.binary_cross_entropy_with_logits(at @ x, wanted, reduction="sum")
        return fit + 0.5 * (at - prior) @ pull @ (at - prior)

    reached = loss(value)
    for _ in range(NEWTON_STEPS):
        p = torch.sigmoid(value @ x)
        gradient = x @ (p - wanted) + pull @ (value - prior)
        step = torch.linalg.solve((x * (p * (1 - p))) @ x.T + pull, gradient)
        while (tried := loss(value - step)) > reached and step.abs().max() > 1e-6:
            step = step / 2
        if tried > reached or step.abs().max() < 1e-6:
            break
        value, reached = value - step, tried
    return float(value[0]) / spread, float(value[1])


def evenly(rows: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` of the rows, evenly spaced."""
    return rows if len(rows) <= most else rows[torch.arange(most) * len(rows) // most]


class _Trainable(nn.Module):
    """A gate in the form that is trained: inputs of the MLP have mean 0 and spread 1, the routers' weights are frozen."""

    def __init__(
        self,
        samples: SourceSamples,
        untrained: LookaheadGate,
        teachers: list[Teacher],
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.untrained = untrained.requires_grad_(False)
        rows = evenly(samples.training, STATISTICS_ROWS)
        source, recent = samples.source(rows), samples.recent(rows)
        self.mean, self.spread = (value.to(device) for value in _moments(torch.cat([source, recent], dim=1)))
        self.base = untrained.base.clone()
        _ridge_bases(self.base, samples, untrained, teachers, device)
        offset = torch.zeros_like(untrained.bias)
        for part in rows.split(CHUNK_ROWS):
            offset += _teach(samples, teachers, part, device).sum(0) / len(rows)
        offset -= functional.linear(source.mean(0).to(device), self.base)
        width, inputs = untrained.down.shape
        init = (torch.rand(width, inputs, generator=generator) * 2 - 1) / math.sqrt(inputs)
        self.factors = nn.Parameter(torch.ones(len(untrained.sizes), samples.input_size, device=device))
        self.bias = nn.Parameter(offset)
        self.down = nn.Parameter(init.to(device))
        self.down_bias = nn.Parameter(torch.zeros(width, device=device))
        self.up = nn.Parameter(torch.zeros_like(untrained.up))

    def forward(self, source: torch.Tensor, recent: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(source, self._scaled_base(), self.bias)
        inner = functional.linear(torch.cat([source, recent], dim=1), *self._folded_down())
        return logits + functional.linear(functional.silu(inner), self.up)

    @torch.no_grad()
    def folded(self) -> LookaheadGate:
        """A gate that computes the same from inputs as they come."""
        old = self.untrained
        gate = LookaheadGate(self.base.shape[1], old.sizes, old.top_k, old.width).to(self.base.device)
        gate.base.copy_(self._scaled_base())
        gate.bias.copy_(self.bias)
        for parameter, value in zip((gate.down, gate.down_bias), self._folded_down(), strict=True):
            parameter.copy_(value)
        gate.up.copy_(self.up)
        return gate.requires_grad_(False)

    def _folded_down(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(down, its bias) for inputs as they come."""
        down = self.down / self.spread
        return down, self.down_bias - down @ self.mean

    def _scaled_base(self) -> torch.Tensor:
        parts = zip(self.base.split(self.untrained.sizes), self.factors, strict=True)
        return torch.cat([base * factors for base, factors in parts])


def _train(
    model: _Trainable,
    samples: SourceSamples,
    teachers: list[Teacher],
    settings: AlignConfig,
    generator: torch.Generator,
    device: torch.device,
) -> Iterator[int]:
    """Train, giving way after every epoch: yields its number."""
    batch = min(settings.batch, max(settings.least_batch, len(samples.training) // settings.least_steps))
    steps = max(1, len(samples.training) // batch)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], settings.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=steps * settings.epochs + 1, pct_start=0.1
    )
    for epoch in range(1, settings.epochs + 1):
        order = _mixed(samples, generator)
        for step in range(steps):
            rows = order[step * batch : (step + 1) * batch]
            wanted = _teach(samples, teachers, rows, device)
            chosen = [part.to(device) for part in samples.chosen(rows)]
            logits = model(samples.source(rows).to(device), samples.recent(rows).to(device))
            loss = training_loss(logits, wanted, chosen, samples.targets, model.untrained)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        yield epoch


def training_loss(
    logits: torch.Tensor,
    wanted: torch.Tensor,
    chosen: Sequence[torch.Tensor],
    targets: Sequence[Target],
    gate: LookaheadGate,
) -> torch.Tensor:
    """The mean over targets of the logarithm of the distance to the scores, or beyond the token to the choice.

    logits and wanted: float32 [rows, outputs], the targets side by side as in the gate; chosen: int64 [rows, k] of each.
    """
    loss = logits.new_zeros(())
    parts = zip(targets, gate.split(logits), gate.split(wanted), chosen, gate.top_k, strict=True)
    for target, found, teacher, experts, k in parts:
        if target.next_token:
            mask = chosen_mask(experts, found.shape[1]).to(found.dtype)
            distance = functional.binary_cross_entropy_with_logits(found, mask)
        else:
            distance = _score_distance(found, teacher, k)
        loss = loss + (distance + LEAST_DISTANCE).log()
    return loss / len(gate.sizes)


def _score_distance(found: torch.Tensor, teacher: torch.Tensor, k: int) -> torch.Tensor:
    """Mean squared distance, weighted: most at the boundary of the choice. float32 [rows, experts] both."""
    spread = teacher.std(dim=1, keepdim=True, correction=0).clamp_min(torch.finfo(torch.float32).tiny)
    weights = torch.exp(-FALL_OFF * (teacher - boundary(teacher, k)).abs() / spread) + FAR_WEIGHT
    return (weights * (found - teacher).square()).sum() / weights.sum()


def _mixed(samples: SourceSamples, generator: torch.Generator) -> torch.Tensor:
    """The training rows in a new order that needs only part of a long trace in memory at a time."""
    rows = samples.training
    size = max(1, GROUP_BYTES // (2 * samples.input_size))
    groups = [group[torch.randperm(len(group), generator=generator)] for group in rows.split(size)]
    return torch.cat([groups[index] for index in torch.randperm(len(groups), generator=generator).tolist()])


def _at(samples: SourceSamples, rows: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    return samples.scores(rows), samples.chosen(rows)


def _teach(samples: SourceSamples, teachers: list[Teacher], rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The logits to learn, targets side by side: float32 [rows, outputs]."""
    parts = zip(teachers, *_at(samples, rows), strict=True)
    return torch.cat([teacher(scores.to(device), chosen.to(device)) for teacher, scores, chosen in parts], dim=1)


def _moments(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and spread of every column, none of the spreads zero."""
    spread = values.std(0, correction=0)
    least = LEAST_SPREAD * float(spread.mean())
    return values.mean(0), spread.clamp_min(least or 1.0)


@torch.no_grad()
def _ridge_bases(
    base: torch.Tensor,
    samples: SourceSamples,
    untrained: LookaheadGate,
    teachers: list[Teacher],
    device: torch.device,
) -> None:
    """Where no router weights could be put, fill `base` by ridge regression."""
    missing = torch.cat([part.any().logical_not().expand(len(part)) for part in base.split(untrained.sizes)])
    if not missing.any():
        return
    rows = evenly(samples.training, RIDGE_ROWS)
    size, outputs = samples.input_size, int(missing.sum())
    sums, total = torch.zeros(size, device=device), torch.zeros(outputs, device=device)
    squares, products = torch.zeros(size, size, device=device), torch.zeros(size, outputs, device=device)
    for part in rows.split(CHUNK_ROWS):
        x, y = samples.source(part).to(device), _teach(samples, teachers, part, device)[:, missing]
        sums += x.sum(0)
        total += y.sum(0)
        squares.addmm_(x.T, x)
        products.addmm_(x.T, y)
    count = len(rows)
    squares = squares / count - torch.outer(sums, sums) / count**2
    products = products / count - torch.outer(sums, total) / count**2
    damping = RIDGE * float(squares.diagonal().mean()) or 1.0
    squares += damping * torch.eye(size, device=device)
    base[missing] = torch.linalg.solve(squares, products).T


@torch.no_grad()
def _rounded(gate: LookaheadGate, samples: SourceSamples) -> LookaheadGate:
    """The gate with every value as float16 will hold it."""
    for parameter in gate.parameters():
        parameter.copy_(parameter.half().float())
        if not torch.isfinite(parameter).all():
            raise ForegateError(
                f"{samples.trace.path}: the gate of source {samples.source_index} grows beyond float16: the trace has "
                "values that are not finite or far out; record it again"
            )
    return gate
