"""What makes a lookahead gate good: its form, loss, training text and horizon, and how far from the ceiling it stays.

Each kind of experiment trains gates of a few sources on one trace and judges them on another, of held-out text, by the
share of the chosen experts among the k that the gate ranks first. Results are added to OUT kind by kind.

    python benchmarks/gate_ablation.py demo/mixtral-tiny TRAIN_TRACE HELDOUT_TRACE --sources 1,4,8 --json OUT
"""

import argparse
import copy
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from gate_variants import Data, Form, Variant, fit_variant, judge, recall_of, ridge
from safetensors import safe_open

from foregate.config import AlignConfig
from foregate.lookahead.align import default_width
from foregate.lookahead.baselines import by_next_router, by_previous_token, fit_probe, frequencies
from foregate.lookahead.fit import fit_gate, recall
from foregate.lookahead.gate import LookaheadGate, untrained_gate
from foregate.lookahead.gates import GatesHeader
from foregate.lookahead.samples import SourceSamples, gate_layers, router_weights
from foregate.lookahead.trace import Trace

HORIZON = 3
FAR_HORIZON = 6
CONTEXT = 512  # tokens that attention is over where it is counted
TOKENS = 51_200  # of training, for forms and losses
TOKEN_STEPS = (10_240, 51_200, 0)
WIDTHS = (0, 8, 16, 32, 64, 128, 256)
RANKS = (8, 16, 32, 64)
LOSSES = ("weighted mse", "mse", "bce", "ce", "kl", "mse+rank", "kl+rank")
KINDS_OF_TEXT = ("bible", "python", "handbook-de")
CEILINGS = {
    "width 1024": Form(1024, rate=1e-3, epochs=5),
    "width 512, dropout 0.1": Form(512, rate=2e-3, dropout=0.1),
    "width 256, more inputs": Form(256, rate=3e-3, earlier=True),
}
CPU = torch.device("cpu")

Row = dict[str, Any]


class Model:
    """What gates of one model are given, and how much its backbone computes."""

    def __init__(self, checkpoint: Path, train: Trace, heldout: Trace) -> None:
        self.train, self.heldout = train, heldout
        self.layers, self.routers = gate_layers(train), router_weights(train)
        self.backbone_parameters = train.header.backbone_parameters
        self.multiplications = _multiplications(checkpoint)
        self.attention = _attention(checkpoint)
        header = GatesHeader(self.layers, train.header.embedding_size, HORIZON, 0, {})
        self.width = default_width(header, self.backbone_parameters)

    def samples(self, source: int, *, tokens: int = 0, horizon: int = HORIZON) -> SourceSamples:
        return SourceSamples(self.train, source, horizon, tokens)

    def judged(self, source: int, *, horizon: int = HORIZON) -> SourceSamples:
        return SourceSamples(self.heldout, source, horizon)

    def untrained(self, source: int, width: int = 0, horizon: int = HORIZON) -> LookaheadGate:
        size = self.train.header.embedding_size
        size = size if source == len(self.layers) else self.layers[source].input_size
        return untrained_gate(self.layers, self.routers, source, horizon, width, size)

    def fit(self, samples: SourceSamples, width: int) -> LookaheadGate:
        """The product's own training."""
        gate = self.untrained(samples.source_index, width, len(samples.targets))
        return fit_gate(samples, gate, AlignConfig(), CPU).gate

    def cost(self, learned: int, multiplications: int) -> Row:
        """What gates of this size cost when every source has one, in numbers and as shares of the backbone."""
        sources = len(self.layers) + 1
        learned, multiplications = learned * sources, multiplications * sources
        return {
            "learned": learned,
            "learned_share": learned / self.backbone_parameters,
            "multiplications": multiplications,
            "multiplications_share": multiplications / self.multiplications,
            "multiplications_share_with_attention": multiplications / (self.multiplications + self.attention),
        }

    def gate_cost(self, gate: LookaheadGate) -> Row:
        factors = len(gate.sizes) * gate.base.shape[1]
        return self.cost(gate.learned_parameters + factors, gate.multiplications)


def _multiplications(checkpoint: Path) -> int:
    """Multiply-adds of the backbone's weights for one token: experts and the look-up of embeddings left out."""
    total, tied = 0, json.loads((checkpoint / "config.json").read_text())["tie_word_embeddings"]
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                shape = tensors.get_slice(name).get_shape()
                if len(shape) == 2 and "experts." not in name and (tied or "embed_tokens" not in name):
                    total += shape[0] * shape[1]
    return total


def _attention(checkpoint: Path) -> int:
    """Multiply-adds of attention over CONTEXT tokens, for one token."""
    config = json.loads((checkpoint / "config.json").read_text())
    return 2 * CONTEXT * config["num_attention_heads"] * config["head_dim"] * config["num_hidden_layers"]


def _only(samples: SourceSamples, text: int) -> SourceSamples:
    """The samples of one text."""
    part = copy.copy(samples)
    for name in ("rows", "training", "validation"):
        rows = getattr(samples, name)
        setattr(part, name, rows[samples.text_of(rows) == text])
    return part


def _recall(samples: SourceSamples, gate: LookaheadGate) -> list[float]:
    return list(recall(samples, gate, samples.rows, CPU))


@cache
def _data(model: Model, source: int, tokens: int, earlier: bool) -> tuple[Data, Data, Data]:
    """Training, validation and held-out rows of a source."""
    samples, judged = model.samples(source, tokens=tokens), model.judged(source)
    read = partial(Data.of, earlier=earlier)
    return read(samples, samples.training), read(samples, samples.validation), read(judged, judged.rows)


def _trained(model: Model, source: int, form: Form, tokens: int) -> tuple[Variant, Row]:
    training, validation, test = _data(model, source, tokens, form.earlier)
    net = fit_variant(form, model.untrained(source), training, validation)
    return net, {"recall": judge(net, test), **model.cost(net.learned, net.multiplications)}


def forms(model: Model, source: int) -> Iterator[Row]:
    """From no training at all to as many inputs and parameters as one likes."""
    yield from _closed_forms(model, source)
    samples, judged = model.samples(source, tokens=TOKENS), model.judged(source)
    for width in WIDTHS:
        gate = model.fit(samples, width)
        name = f"MLP {width}" if width else "factors and bias"
        yield {"form": name, "recall": _recall(judged, gate), **model.gate_cost(gate)}
    yield from _other_forms(model, source)


def _other_forms(model: Model, source: int) -> Iterator[Row]:
    others = {f"linear, rank {rank}": Form(rank, activation=False) for rank in RANKS}
    others["linear, rank 16, no routers"] = Form(16, activation=False, routers="none")
    others["MLP 64, no routers"] = Form(64, routers="none")
    for width in (8, 64):
        others[f"MLP {width}, routers trained on"] = Form(width, routers="learned")
    for width in (model.width, 64):
        others[f"MLP {width}, no recent scores"] = Form(width, recent=False)
        others[f"MLP {width}, recent router inputs too"] = Form(width, earlier=True)
    for name, form in others.items():
        yield {"form": name, **_trained(model, source, form, TOKENS)[1]}


def _closed_forms(model: Model, source: int) -> Iterator[Row]:
    training, _, test = _data(model, source, TOKENS, False)
    untrained, judged = model.untrained(source), model.judged(source)
    aims = [target.layer for target in judged.targets]
    found = partial(recall_of, chosen=test.chosen)
    plain = torch.cat([by_next_router(test.source, model.routers[aim]) for aim in aims], 1)
    routers = model.cost(0, untrained.multiplications)
    yield {"form": "routers, no norm", "recall": found(plain), **routers}
    yield {"form": "routers behind norms (untrained)", "recall": _recall(judged, untrained), **routers}
    outputs = len(untrained.base)
    shift = (training.wanted - training.source @ untrained.base.T).mean(0)
    logits = test.source @ untrained.base.T + shift
    yield {"form": "bias", "recall": found(logits), **model.cost(outputs, untrained.multiplications)}
    for name, columns in (("linear, full rank, no recent scores", 0), ("linear, full rank", outputs)):
        seen = [torch.cat([data.source, data.recent[:, :columns]], 1) for data in (training, test)]
        weight, bias = ridge(seen[0], training.wanted)
        cost = model.cost(weight.numel() + outputs, weight.numel())
        yield {"form": name, "recall": found(seen[1] @ weight + bias), **cost}
    logits = [
        fit_probe(model.train, aim, model.samples(source).training).logits(
            model.heldout.inputs(aim)[judged.rows + target.next_token].float()
        )
        for aim, target in zip(aims, judged.targets, strict=True)
    ]
    yield {"form": "probe on the target's own router input", "recall": found(torch.cat(logits, 1))}


def losses(model: Model, source: int) -> Iterator[Row]:
    for loss in LOSSES:
        yield {"loss": loss, **_trained(model, source, Form(model.width, loss=loss), TOKENS)[1]}


def tokens(model: Model, source: int) -> Iterator[Row]:
    """How much text training needs."""
    judged = model.judged(source)
    for width in (model.width, 256):
        for count in TOKEN_STEPS:
            samples = model.samples(source, tokens=count)
            gate = model.fit(samples, width)
            yield {"width": width, "tokens": len(samples.training), "recall": _recall(judged, gate)}


def horizons(model: Model, source: int) -> Iterator[Row]:
    """How far ahead, over the token boundary too; the same width for all."""
    judged = model.judged(source, horizon=FAR_HORIZON)
    ahead = [list(target) for target in judged.targets]
    untrained = model.untrained(source, horizon=FAR_HORIZON)
    shares = frequencies(model.train, model.samples(source).training)
    chosen = torch.stack(judged.chosen(judged.rows))
    before = judged.recent_chosen(judged.rows)
    shares = [shares[target.layer] for target in judged.targets]
    last = torch.cat([by_previous_token(*pair) for pair in zip(before, shares, strict=True)], 1)
    frequent = torch.cat(shares).expand(len(last), -1)
    for name, logits in (("frequency", frequent), ("previous token", last)):
        yield {"gate": name, "targets": ahead, "recall": recall_of(logits, chosen)}
    yield {"gate": "untrained", "targets": ahead, "recall": _recall(judged, untrained)}
    gate = model.fit(model.samples(source, tokens=TOKENS, horizon=FAR_HORIZON), model.width)
    yield {"gate": "trained", "targets": ahead, "recall": _recall(judged, gate)}


def texts(model: Model, source: int) -> Iterator[Row]:
    """Trained on one kind of text, judged on another."""
    samples, judged = model.samples(source), model.judged(source)
    names = [text.name for text in model.train.texts]
    learned = {kind: next(i for i, name in enumerate(names) if kind in name) for kind in KINDS_OF_TEXT}
    gates = {kind: model.fit(_only(samples, text), model.width) for kind, text in learned.items()}
    few = model.train.num_tokens // len(names)
    gates["all, as few tokens"] = model.fit(model.samples(source, tokens=few), model.width)
    gates["all"] = model.fit(samples, model.width)
    gates["untrained"] = model.untrained(source)
    for index, text in enumerate(model.heldout.texts):
        part = _only(judged, index)
        for name, gate in gates.items():
            yield {"trained_on": name, "judged_on": text.name, "recall": _recall(part, gate)}


def ceilings(model: Model, source: int) -> Iterator[Row]:
    """Where gates end, however large: with the same inputs and with more. All training tokens."""
    judged = model.judged(source)
    yield {"gate": "untrained", "recall": _recall(judged, model.untrained(source))}
    for name, width in (("default", model.width), ("width 256", 256)):
        gate = model.fit(model.samples(source), width)
        yield {"gate": name, "recall": _recall(judged, gate), **model.gate_cost(gate)}
    for name, form in CEILINGS.items():
        yield {"gate": name, **_trained(model, source, form, 0)[1]}


def quantized(model: Model, source: int, *, pairs: list[tuple[Trace, Trace]]) -> Iterator[Row]:
    """Gates of the 16-bit model where experts have fewer bits, and gates trained there."""
    few = pairs[0][0].num_tokens
    own = model.fit(model.samples(source, tokens=few), model.width)
    rows = {model.train.header.bits: SourceSamples(model.heldout, source, HORIZON, pairs[0][1].num_tokens)}
    trained = {model.train.header.bits: own}
    for train, heldout in pairs:
        rows[train.header.bits] = SourceSamples(heldout, source, HORIZON)
        trained[train.header.bits] = model.fit(SourceSamples(train, source, HORIZON), model.width)
    for bits, judged in rows.items():
        gates = {"untrained": model.untrained(source), "trained at 16 bits": own, "trained at these": trained[bits]}
        for name, gate in gates.items():
            yield {"gate": name, "bits": bits, "recall": _recall(judged, gate)}


KINDS = {
    "form": forms,
    "loss": losses,
    "horizon": horizons,
    "texts": texts,
    "quantized": quantized,
    "tokens": tokens,
    "ceiling": ceilings,
}


def sources_of(kind: str, sources: Iterable[int], layers: int) -> list[int]:
    """Horizons are also judged over the token boundary and from the sampled token."""
    wrapped = [layers - 1, layers] if kind == "horizon" else []
    return sorted({*sources, *wrapped})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--sources", default="1,4", help="MoE layers")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of experiments")
    parser.add_argument("--quantized", type=Path, nargs=2, action="append", default=[], metavar=("TRAIN", "HELDOUT"))
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    model = Model(args.checkpoint, Trace(args.train), Trace(args.heldout))
    pairs = [(Trace(train), Trace(heldout)) for train, heldout in args.quantized]
    experiments = {**KINDS, "quantized": partial(quantized, pairs=pairs)}
    result = json.loads(args.json.read_text()) if args.json.exists() else {}
    result["model"] = {
        "checkpoint": args.checkpoint.name,
        "training_tokens": model.train.num_tokens,
        "heldout_tokens": model.heldout.num_tokens,
        "backbone_parameters": model.backbone_parameters,
        "backbone_multiplications": model.multiplications,
        f"attention_multiplications_over_{CONTEXT}": model.attention,
        "default_width": model.width,
        "align": asdict(replace(AlignConfig(), width=model.width)),
    }
    for kind in args.kinds.split(","):
        result[kind] = rows = []
        for source in sources_of(kind, map(int, args.sources.split(",")), len(model.layers)):
            started = time.process_time()
            for row in experiments[kind](model, source):
                rows.append({"source": source, **row, "cpu_seconds": round(time.process_time() - started, 1)})
                print(kind, rows[-1], flush=True)
                started = time.process_time()
                args.json.write_text(json.dumps(result, indent=1) + "\n")
            _data.cache_clear()


if __name__ == "__main__":
    main()
