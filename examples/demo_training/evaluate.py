"""Held-out compression, expert usage and sample text of a saved model, through transformers."""

from __future__ import annotations

import json
import lzma
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .corpus import Corpus
from .sources import KINDS

# Windows of CONTEXT tokens start every STRIDE tokens; only a window's last
# STRIDE tokens count, so that every token is predicted once, from a long past.
CONTEXT, STRIDE = 1024, 768
LEAST_SHARE = 0.002
PROMPTS = (
    'Windmill \\Wind"mill`\\, n.\n  ',
    "Pour installer un paquet Debian, il faut",
    'def read_lines(path):\n    """',
)


@dataclass(frozen=True)
class Measured:
    """One kind of held-out text: summed loss, number of tokens, and tokens by (layer, expert)."""

    nats: float
    tokens: int
    usage: Tensor


def evaluate(folder: Path, out: Path, cache: Path) -> None:
    """Write heldout.json, experts.json and samples.json for the model in ``folder``."""
    corpus = Corpus(cache)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = {kind: corpus.text("heldout", kind) for kind in KINDS}
    measured = {kind: measure(model, tokenizer, text) for kind, text in texts.items()}
    table = {kind: compression(texts[kind].encode(), measured[kind]) for kind in KINDS}
    heldout = {"context": CONTEXT, "stride": STRIDE, "kinds": table}
    write_json(out / "heldout.json", heldout)
    usage = {kind: m.usage for kind, m in measured.items()}
    write_json(out / "experts.json", expert_usage(usage, model.config.num_experts_per_tok))
    write_json(out / "samples.json", {prompt: sample(model, tokenizer, prompt) for prompt in PROMPTS})


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as readable JSON."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@torch.no_grad()
def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> Measured:
    """Loss and expert usage over the whole text."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    stream = torch.tensor([tokenizer.bos_token_id, *ids])
    active = model.config.num_experts_per_tok
    nats, usage = 0.0, torch.zeros(expert_table(model), dtype=torch.long)
    for first in range(0, len(ids), STRIDE):
        begin, end = max(0, first + STRIDE - CONTEXT), min(first + STRIDE, len(ids))
        window = stream[begin : end + 1].clone()
        window[0] = tokenizer.bos_token_id
        output = model(window[None, :-1], output_router_logits=True)
        counted = end - first
        nats += F.cross_entropy(output.logits[0, -counted:], window[-counted:], reduction="sum").item()
        chosen = [logits[-counted:].topk(active).indices.flatten() for logits in output.router_logits]
        usage += torch.stack([torch.bincount(numbers, minlength=usage.shape[1]) for numbers in chosen])
    return Measured(nats, len(ids), usage)


def expert_table(model: PreTrainedModel) -> tuple[int, int]:
    """Layers and experts of the model."""
    config = model.config
    return config.num_hidden_layers, getattr(config, "num_local_experts", None) or config.num_experts


def compression(data: bytes, measured: Measured) -> dict[str, float]:
    """One row of the held-out table: the model's bits per byte beside those of ``xz -9e``."""
    packed = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
    return {
        "bytes": len(data),
        "tokens": measured.tokens,
        "xz_bits_per_byte": round(8 * len(packed) / len(data), 4),
        "model_bits_per_byte": round(measured.nats / float(np.log(2)) / len(data), 4),
        "nats_per_token": round(measured.nats / measured.tokens, 4),
    }


def expert_usage(usage: dict[str, Tensor], active: int) -> dict[str, object]:
    """Shares by kind, layer and expert, and how much the kind tells about the expert.

    An expert's share is that of its layer's choices: shares add up to 1, and
    ``active`` times the share is the part of all tokens that the expert works on.
    """
    shares = {kind: (u / u.sum(1, keepdim=True)).double().numpy() for kind, u in usage.items()}
    total = sum(usage.values())
    overall = (total / total.sum(1, keepdim=True)).double().numpy()
    information = mutual_information(np.stack(list(shares.values())))
    return {
        "least_share_of_choices": round(float(overall.min()), 5),
        "least_share_of_tokens": round(float(overall.min()) * active, 5),
        "experts_under_0.2_percent_of_choices": int((overall < LEAST_SHARE).sum()),
        "experts_under_0.2_percent_of_tokens": int((overall * active < LEAST_SHARE).sum()),
        "mutual_information_bits": [round(float(bits), 4) for bits in information],
        "mean_mutual_information_bits": round(float(information.mean()), 4),
        "share_over_all_kinds": overall.round(5).tolist(),
        "share_by_kind": {kind: share.round(5).tolist() for kind, share in shares.items()},
    }


def mutual_information(shares: np.ndarray) -> np.ndarray:
    """Bits that the kind of text tells about the expert, by layer, for equally likely kinds.

    ``shares`` is (kinds, layers, experts); at most log2(kinds) bits are possible.
    """
    mean = shares.mean(0)
    ratio = np.divide(shares, mean, out=np.ones_like(shares), where=shares > 0)
    return (shares * np.log2(ratio)).sum(-1).mean(0)


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """What the model writes after ``prompt``, with its own generation settings and a fixed seed."""
    torch.manual_seed(0)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**{key: inputs[key] for key in ("input_ids", "attention_mask")}, max_new_tokens=120)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
