"""The training loop: a wall-clock budget, bf16 products, fp32 master weights."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .corpus import Corpus
from .model import SHAPES, MoeModel, Routing
from .optimizer import Optimizer

# Share of the training windows by kind.  The handbooks are small: a larger
# share would only repeat them more often.
MIX = {
    "dictionary": 0.26,
    "handbook-en": 0.10,
    "handbook-fr": 0.09,
    "handbook-de": 0.11,
    "handbook-es": 0.10,
    "bible": 0.12,
    "python": 0.22,
}
# Later shares: Python is what xz compresses best (it sees the whole file), so it gets what the other kinds,
# which are well below xz by then, no longer need.
LATE_MIX = {
    "dictionary": 0.07,
    "handbook-en": 0.05,
    "handbook-fr": 0.05,
    "handbook-de": 0.05,
    "handbook-es": 0.05,
    "bible": 0.05,
    "python": 0.68,
}
LATE_FROM = 0.35
BATCH_TOKENS = 8192
MICRO_TOKENS = {"cpu": 2048, "cuda": 8192}
# Windows are short while the model learns words, long once it can use the context.
SHORT_WINDOW, LONG_WINDOW, LONG_FROM = 256, 1024, 0.72
WARMUP, DECAY_FROM, FINAL_RATE = 0.015, 0.45, 0.02
# Many small experts need a stronger push, or some are never chosen.
BALANCE_LOSS = {"mixtral": 0.01, "qwen3-moe": 0.03}
# The balancing loss fades with an expert's probability: one that is hardly ever chosen needs more than a push.
REVIVE_BELOW, REVIVE_UNTIL, REVIVE_NOISE = 0.004, 0.85, 0.1
Z_LOSS, USAGE_MEMORY = 1e-4, 0.95
CLIP_NORM = 1.0
LOG_SECONDS, CHECKPOINT_SECONDS, VALIDATE_SECONDS = 20, 600, 420
VALIDATION_WINDOWS = 16


@dataclass
class Progress:
    """What a resumed run must know beside the tensors."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class Run:
    """One model in training."""

    model: MoeModel
    optimizer: Optimizer
    corpus: Corpus
    device: torch.device
    # Running share of tokens by (layer, expert): the balance over the whole mix,
    # so that one window may well use a few experts only.
    usage: Tensor
    balance_loss: float
    progress: Progress = field(default_factory=Progress)


def train(name: str, out: Path, minutes: float, device: str, cache: Path) -> Run:
    """Train for ``minutes`` in all, continuing from ``out``'s checkpoint where there is one."""
    torch.manual_seed(0)
    corpus = Corpus(cache)
    model = MoeModel(SHAPES[name]).to(device)
    usage = torch.full((SHAPES[name].layers, SHAPES[name].experts), 1 / SHAPES[name].experts, device=device)
    run = Run(model, Optimizer(model), corpus, torch.device(device), usage, BALANCE_LOSS[name])
    out.mkdir(parents=True, exist_ok=True)
    if (out / "checkpoint.safetensors").is_file():
        load_checkpoint(run, out / "checkpoint.safetensors")
    model.compile()
    loop(run, out, minutes * 60)
    save_checkpoint(run, out / "checkpoint.safetensors")
    return run


def loop(run: Run, out: Path, budget: float) -> None:
    """Steps until the budget is used up; the schedule follows the share that is used."""
    started = time.monotonic() - run.progress.seconds
    windows = Windows(run.corpus)
    logged, losses = run.progress.seconds, []
    validated = saved = run.progress.seconds
    while (share := run.progress.seconds / budget) < 1:
        run.progress.step += 1
        rate = learning_rate(share)
        mix, length = MIX if share < LATE_FROM else LATE_MIX, SHORT_WINDOW if share < LONG_FROM else LONG_WINDOW
        losses.append(step(run, windows, mix, length, rate))
        run.progress.seconds = now = time.monotonic() - started
        run.progress.tokens += BATCH_TOKENS
        if now - logged >= LOG_SECONDS or now >= budget:
            record = {"loss": round(float(np.mean(losses)), 4), "rate": round(rate, 4)}
            record["least_used"] = round(float(run.usage.min()), 4)
            if now - validated >= VALIDATE_SECONDS or now >= budget:
                record["valid_bits_per_byte"] = validate(run)
                record["revived"] = revive(run) if share < REVIVE_UNTIL else 0
                validated = now
            write_log(run, out, record)
            logged, losses = now, []
        if now - saved >= CHECKPOINT_SECONDS:
            save_checkpoint(run, out / "checkpoint.safetensors")
            saved = now


def learning_rate(share: float) -> float:
    """Warm-up, a plateau, and a linear way down, by the used share of the time budget."""
    if share < WARMUP:
        return (share + 0.001) / (WARMUP + 0.001)
    return max(FINAL_RATE, min(1.0, (1 - share) / (1 - DECAY_FROM)))


def step(run: Run, windows: Windows, mix: dict[str, float], length: int, rate: float) -> float:
    """One optimizer step over BATCH_TOKENS; returns the mean loss in nats per token."""
    micro = MICRO_TOKENS[run.device.type]
    rounds = BATCH_TOKENS // micro
    parameters = dict(run.model.named_parameters())
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    copies = {name: p.detach().bfloat16().requires_grad_() for name, p in parameters.items()}
    total = 0.0
    for ids, targets in windows.batches(run.progress.step, mix, length, micro // length, rounds):
        hidden, routings = run.model(ids.to(run.device), copies)
        logits = F.linear(hidden, copies["embedding"]).flatten(0, 1).float()
        loss = F.cross_entropy(logits, targets.flatten().to(run.device))
        ((loss + routing_loss(routings, run.usage, run.balance_loss)) / rounds).backward()
        total += loss.item() / rounds
        # Sums of gradients are kept in fp32.
        for name, copy in copies.items():
            parameters[name].grad += copy.grad
            copy.grad = None
    torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP_NORM)
    run.optimizer.step(run.progress.step, rate)
    return total


def routing_loss(routings: list[Routing], usage: Tensor, balance_loss: float) -> Tensor:
    """Load balance over the recent mix of text, and a bound on the router's logits."""
    experts = usage.shape[1]
    losses = []
    for layer, routing in enumerate(routings):
        counts = torch.bincount(routing.experts.flatten(), minlength=experts)
        usage[layer].lerp_(counts / routing.experts.numel(), 1 - USAGE_MEMORY)
        share = routing.logits.softmax(-1).mean(0)
        balance = experts * (usage[layer].clone() * share).sum()
        losses.append(balance_loss * balance + Z_LOSS * routing.logits.logsumexp(-1).square().mean())
    return torch.stack(losses).mean()


@torch.no_grad()
def revive(run: Run) -> int:
    """Make experts with hardly a token noisy copies of their layer's busiest; returns how many."""
    revived = 0
    for index, usage in enumerate(run.usage):
        for idle in (usage < REVIVE_BELOW).nonzero().flatten().tolist():
            busiest = int(usage.argmax())
            for name in ("router", "gate_up", "down"):
                weight = getattr(run.model.layers[index], name)
                weight[idle] = weight[busiest] * (1 + REVIVE_NOISE * torch.randn_like(weight[idle]))
                for part in ("momentum", "square"):
                    if (state := run.optimizer.state.get(f"{part}.layers.{index}.{name}")) is not None:
                        state[idle] = state[busiest]
            usage[idle] = usage[busiest] = usage[busiest] / 2
            revived += 1
    return revived


class Windows:
    """Training windows, drawn by kind; a step's windows depend on its number alone."""

    def __init__(self, corpus: Corpus) -> None:
        self.streams = [corpus.train_tokens(kind) for kind in MIX]
        self.bos = corpus.tokenizer.bos_token_id

    def batches(
        self, step: int, mix: dict[str, float], length: int, count: int, rounds: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """``rounds`` pairs of inputs and targets, each (count, length)."""
        random = np.random.default_rng(step)
        kinds = random.choice(len(self.streams), size=(rounds, count), p=list(mix.values()))
        for row in kinds:
            starts = [random.integers(len(self.streams[kind]) - length) for kind in row]
            targets = np.stack([self.streams[k][s : s + length] for k, s in zip(row, starts, strict=True)])
            targets = targets.astype(np.int64)
            yield begin_with(self.bos, targets), torch.from_numpy(targets)


def begin_with(bos: int, targets: np.ndarray) -> Tensor:
    """The inputs that predict ``targets``: every window begins with bos, as a prompt does."""
    inputs = np.full_like(targets, bos)
    inputs[:, 1:] = targets[:, :-1]
    return torch.from_numpy(inputs)


@torch.no_grad()
def validate(run: Run) -> dict[str, float]:
    """Bits per byte by kind over the first windows of the validation text."""
    results = {}
    tokenizer = run.corpus.tokenizer
    for kind in MIX:
        ids = tokenizer(run.corpus.text("valid", kind), add_special_tokens=False, verbose=False)["input_ids"]
        targets = np.array(ids[: VALIDATION_WINDOWS * SHORT_WINDOW]).reshape(-1, SHORT_WINDOW)
        size = len(tokenizer.decode(targets.flatten()).encode())
        nats = 0.0
        # As many windows at a time as in training: the compiled code is for that shape.
        for rows in np.split(targets, len(targets) // (MICRO_TOKENS["cpu"] // SHORT_WINDOW)):
            logits = run.model.logits(begin_with(tokenizer.bos_token_id, rows).to(run.device)).flatten(0, 1)
            nats += F.cross_entropy(logits, torch.from_numpy(rows).flatten().to(run.device), reduction="sum").item()
        results[kind] = round(float(nats / np.log(2) / size), 4)
    return results


def write_log(run: Run, out: Path, record: dict) -> None:
    """Append one line to the training log."""
    p = run.progress
    line = {"step": p.step, "seconds": round(p.seconds, 1), "tokens": p.tokens, **record}
    with (out / "training.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def save_checkpoint(run: Run, path: Path) -> None:
    """Write weights and optimizer state; the old checkpoint stays until the new one is complete."""
    tensors = {f"model.{name}": p.detach() for name, p in run.model.named_parameters()}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in run.optimizer.state.items()}
    tensors["usage"] = run.usage
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"progress": json.dumps(vars(run.progress))})
    os.replace(partial, path)


def load_checkpoint(run: Run, path: Path) -> None:
    """Continue where :func:`save_checkpoint` stopped."""
    targets = {f"model.{name}": p.data for name, p in run.model.named_parameters()}
    targets |= {f"optimizer.{name}": tensor for name, tensor in run.optimizer.state.items()}
    targets["usage"] = run.usage
    with safe_open(path, framework="pt") as file:
        for name, target in targets.items():
            target.copy_(file.get_tensor(name))
        run.progress = Progress(**json.loads(file.metadata()["progress"]))
