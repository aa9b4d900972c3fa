"""Does a reuse head pay? Whether an expert is used again soon, told from the router input, against decayed frequency.

For every MoE layer of a trace, heads are fitted that give each expert's probability to be used again within the next 1, 4
and 16 tokens: linear ones of any size, from the router input alone and with the decayed frequencies beside it, and the small one
that `foregate align` trains. They are judged on held-out text
by the area under the curve, and by the misses of a cache that evicts by them, beside LRU, decayed frequency and Belady's
rule, which knows the future.

    python benchmarks/reuse_head.py TRAIN_TRACE HELDOUT_TRACE --json OUT
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from foregate.lookahead.metrics import chosen_mask
from foregate.lookahead.reuse import WINDOWS, fit_reuse_head, history_features, reused
from foregate.lookahead.trace import Trace

HALF_LIVES = (1, 2, 4, 8, 16, 32, 64)  # tokens, of decayed frequencies
WIDTH = 64  # of the head, as in the demo models' gates
BUDGETS = (0.125, 0.25, 0.5)
EPOCHS, BATCH, RATE = 4, 512, 3e-3
NEVER = 1 << 30


@dataclass
class Layer:
    """What is known of one layer at each token: `used` and the features before, the labels after."""

    inputs: torch.Tensor  # float32 [tokens, hidden]
    scores: torch.Tensor  # float32 [tokens, experts], the router's
    chosen: torch.Tensor  # int16 [tokens, top_k]
    used: torch.Tensor  # bool [tokens, experts]
    decayed: torch.Tensor  # float32 [tokens, half-lives, experts], the token itself included
    age: torch.Tensor  # float32 [tokens, experts], tokens since the last use
    again: torch.Tensor  # bool [tokens, windows, experts]


def read_layer(trace: Trace, layer: int, tokens: int) -> Layer:
    """The first rows of one layer, sequence after sequence as one stream: a cache lives on between texts."""
    experts = trace.layers[layer].num_experts
    used = chosen_mask(trace.chosen(layer)[:tokens].long(), experts)
    decay = 0.5 ** (1 / torch.tensor(HALF_LIVES))
    state, last = torch.zeros(len(HALF_LIVES), experts), torch.full((experts,), 1e4)
    decayed, age = [], []
    for row in used.float():
        state = state * decay[:, None] + row
        last = torch.where(row > 0, torch.zeros(()), last + 1)
        decayed.append(state)
        age.append(last)
    inputs, scores = trace.inputs(layer)[:tokens].float(), trace.scores(layer)[:tokens, :experts].float()
    return Layer(
        inputs, scores, trace.chosen(layer)[:tokens], used, torch.stack(decayed), torch.stack(age), reused(used)
    )


def fit_linear(features: torch.Tensor, again: torch.Tensor) -> nn.Linear:
    """What a head without limits on its size would do, by binary cross-entropy."""
    torch.manual_seed(0)
    head = nn.Linear(features.shape[1], again.shape[1] * again.shape[2])
    nn.init.zeros_(head.weight)
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=0.01)
    target = again.flatten(1).float()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(features)).split(BATCH):
            loss = functional.binary_cross_entropy_with_logits(head(features[rows]), target[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head


def auc(score: torch.Tensor, label: torch.Tensor) -> float:
    """Area under the curve: the probability that a positive is scored above a negative, ties counting half."""
    order = torch.sort(score.flatten().double())
    _, inverse, counts = torch.unique_consecutive(order.values, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks = (ends - (counts.double() - 1) / 2)[inverse]
    positive = label.flatten()[order.indices]
    n, m = int(positive.sum()), int((~positive).sum())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / max(n * m, 1))


def replay(used: list[np.ndarray], keep: np.ndarray, slots: int) -> float:
    """Misses per token of a pool of `slots` for all layers that evicts the resident with the least `keep`.

    used: for each token, the expert ids (layer * experts + expert) in order of layers; keep: [tokens, ids], the score
    that an id has from its layer's turn at that token until its layer's turn at the next.
    """
    per_layer = keep.shape[1] // len(used[0])
    score, resident, misses = np.full(keep.shape[1], -np.inf), np.zeros(keep.shape[1], bool), 0
    for token, layers in enumerate(used):
        for layer, ids in enumerate(layers):
            part = slice(layer * per_layer, (layer + 1) * per_layer)
            score[part] = keep[token, part]
            missing = ids[~resident[ids]]
            misses += len(missing)
            over = int(resident.sum()) + len(missing) - slots
            if over > 0:
                candidates = np.where(resident, score, np.inf)
                candidates[ids] = np.inf
                resident[np.argpartition(candidates, over - 1)[:over]] = False
            resident[missing] = True
    return misses / len(used)


def next_use(used: np.ndarray) -> np.ndarray:
    """[tokens, ids]: the token at which an id is used next, after this one."""
    result, upcoming = np.empty(used.shape, np.int64), np.full(used.shape[1], NEVER)
    for token in range(len(used) - 1, -1, -1):
        result[token] = upcoming
        upcoming = np.where(used[token], token, upcoming)
    return result


def heads(fit: Layer, test: Layer) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, logits [tokens, windows, experts] on the test rows) of every kind of head."""
    mean, std = fit.inputs.mean(0), fit.inputs.std(0).clamp_min(1e-6)

    def features(layer: Layer, history: bool) -> torch.Tensor:
        parts = [(layer.inputs - mean) / std]
        return torch.cat([*parts, layer.decayed.log1p().flatten(1), layer.age.log1p()] if history else parts, 1)

    for name, history in (("linear", False), ("linear with history", True)):
        head = fit_linear(features(fit, history), fit.again)
        with torch.inference_mode():
            yield name, head(features(test, history)).view(test.again.shape)
    head = fit_reuse_head(fit.inputs, fit.scores, fit.chosen, WIDTH, seed=0)
    yield "reuse head", head(test.inputs, history_features(test.used, test.scores))


def evaluate(train: Trace, heldout: Trace, train_tokens: int, replay_tokens: int) -> dict:
    aucs, scores = [], {}
    used_all: list[torch.Tensor] = []
    for index in range(len(train.layers)):
        fit, test = read_layer(train, index, train_tokens), read_layer(heldout, index, heldout.num_tokens)
        rows: dict[str, torch.Tensor] = {f"decayed {h}": test.decayed[:, i] for i, h in enumerate(HALF_LIVES)}
        rows["recency"] = -test.age
        found = {name: [auc(s, test.again[:, w]) for w in range(len(WINDOWS))] for name, s in rows.items()}
        for name, logits in heads(fit, test):
            found[name] = [auc(logits[:, w], test.again[:, w]) for w in range(len(WINDOWS))]
            rows[name] = torch.sigmoid(logits).sum(1)  # expected number of the windows with a use
        aucs.append(found)
        for name, score in rows.items():
            scores.setdefault(name, []).append(score[:replay_tokens])
        used_all.append(test.used[:replay_tokens])
        print(f"layer {index}: " + ", ".join(f"{n} {v[1]:.3f}" for n, v in found.items()), flush=True)
    return {"auc": aucs, "misses": list(replays(used_all, scores))}


def replays(used: list[torch.Tensor], scores: dict[str, list[torch.Tensor]]) -> Iterator[dict]:
    """Misses per token by budget and rule."""
    flags = torch.cat(used, 1).numpy()
    per_layer = used[0].shape[1]
    steps = [
        [np.flatnonzero(row[i * per_layer : (i + 1) * per_layer]) + i * per_layer for i in range(len(used))]
        for row in flags
    ]
    keeps = {name: torch.cat(parts, 1).double().numpy() for name, parts in scores.items()}
    keeps["lru"] = keeps.pop("recency")
    keeps["belady"] = -next_use(flags).astype(float)
    for budget in BUDGETS:
        slots = max(int(budget * flags.shape[1]), max(len(ids) for step in steps for ids in step))
        row = {"budget": budget, "slots": slots, "misses_per_token": {}}
        for name, keep in keeps.items():
            row["misses_per_token"][name] = replay(steps, keep, slots)
        print(f"{budget:.1%}: " + ", ".join(f"{n} {v:.2f}" for n, v in row["misses_per_token"].items()), flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--train-tokens", type=int, default=102400)
    parser.add_argument("--replay-tokens", type=int, default=8192)
    args = parser.parse_args()
    train, heldout = Trace(args.train), Trace(args.heldout)
    result = evaluate(train, heldout, args.train_tokens, args.replay_tokens)
    facts = {
        "model_type": train.model_type,
        "train_tokens": args.train_tokens,
        "heldout_tokens": heldout.num_tokens,
    }
    settings = {"windows": WINDOWS, "half_lives": HALF_LIVES, "replay_tokens": args.replay_tokens}
    args.json.write_text(json.dumps({**facts, **settings, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
