"""The model card, written from the files of a finished run."""

from __future__ import annotations

import json
from pathlib import Path

from .corpus import Corpus
from .evaluate import CONTEXT, STRIDE
from .model import SHAPES, MoeModel
from .train import LATE_FROM, LATE_MIX, LONG_FROM, LONG_WINDOW, MIX, SHORT_WINDOW

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
language: [en, fr, de, es]
license: gpl-2.0
---

# {title}

A Mixture-of-Experts language model of {parameters:.1f} million parameters, trained from scratch as a
demo and test object for Foregate. {shape.layers} layers, hidden size {shape.hidden}, {shape.experts} experts
per layer of which {shape.active} work on each token, vocabulary {shape.vocab} (byte-level BPE), weights in bf16
(`{architecture}`).

It is small enough to ship with the source, and its routing is real: learned, and different for
different kinds of text. It is not a useful assistant.

## Training

{tokens:.1f} million tokens in {minutes:.0f} minutes of wall-clock ({rate:,.0f} tokens per second), by
`examples/train_demo.py`: Muon and AdamW, bf16 products with fp32 master weights, windows of {short}
tokens and of {long} for the last {long_share:.0f} % of the time. Every training window begins with `<|bos|>`, as
every prompt does.

| kind | share of windows, at first and after {late_from:.0f} % of the time | training text (bytes) | source | licence |
|---|---|---|---|---|
{mix}

To respect all of these, the weights are passed on under the strictest: the GNU GPL, version 2 or later.

## Held-out text

Bits per byte (lower is better) beside `xz -9e` on the same text, which the model never saw: whole
chapters (the same in all four languages), books, modules, and a run of dictionary entries. Measured
from these bf16 weights, computed in fp32, windows of {context} tokens with a stride of {stride}.

| kind | bytes | xz -9e | model | nats per token |
|---|---|---|---|---|
{heldout}

## Experts

Over all held-out text the least used expert of any layer works on {least:.2f} % of its layer's tokens, which
is {least_choices:.2f} % of the choices. The kind of text tells {information:.3f} bits about the chosen expert, averaged over layers
(by layer: {by_layer}).

## Samples

Temperature 0.7, top-p 0.9, seed 0; the model's part follows the arrow.

{samples}
## Limitations

The model knows a dictionary, one manual, one Bible translation and Python's library, each
superficially: it writes the style of these texts, not facts. The dictionary is of 1913 and the
Bible of 1611, with the language and the views of their time. It has not been tuned to follow
instructions or to chat; the chat template and the tokens `<|user|>` and `<|assistant|>` only let
software be tried. It was trained on windows of at most {long} tokens.
"""
SOURCES = {
    "dictionary": ("GCIDE (Debian package `dict-gcide`)", "GPL-2+"),
    "handbook": ("Debian Administrator's Handbook (`debian-handbook`)", "GPL-2+ or CC-BY-SA-3.0"),
    "bible": ("King James Bible (`bible-kjv-text`)", "public domain"),
    "python": ("standard library of Python", "PSF-2.0"),
}


def write(name: str, title: str, out: Path, cache: Path) -> None:
    """Write ``README.md`` into the run's model folder."""
    shape = SHAPES[name]
    model_type = json.loads((out / "model/config.json").read_text())["architectures"][0]
    usage = json.loads((out / "experts.json").read_text())
    last = json.loads((out / "training.jsonl").read_text().splitlines()[-1])
    text = CARD.format(
        title=title,
        parameters=sum(p.numel() for p in MoeModel(shape).parameters()) / 1e6,
        shape=shape,
        architecture=model_type,
        tokens=last["tokens"] / 1e6,
        minutes=last["seconds"] / 60,
        rate=last["tokens"] / last["seconds"],
        short=SHORT_WINDOW,
        long=LONG_WINDOW,
        long_share=100 * (1 - LONG_FROM),
        mix=mix_rows(Corpus(cache).sizes),
        context=CONTEXT,
        stride=STRIDE,
        late_from=100 * LATE_FROM,
        heldout=heldout_rows(json.loads((out / "heldout.json").read_text())["kinds"]),
        least=100 * usage["least_share_of_tokens"],
        least_choices=100 * usage["least_share_of_choices"],
        information=usage["mean_mutual_information_bits"],
        by_layer=", ".join(f"{bits:.2f}" for bits in usage["mutual_information_bits"]),
        samples=samples(json.loads((out / "samples.json").read_text())),
    )
    (out / "model/README.md").write_text(text, encoding="utf-8")


def mix_rows(sizes: dict[str, dict[str, int]]) -> str:
    """The table of training text."""
    rows = []
    for kind, share in MIX.items():
        source, licence = SOURCES[kind.split("-")[0]]
        rows.append(
            f"| {kind} | {share:.0%}, {LATE_MIX[kind]:.0%} | {sizes[kind]['train_bytes']:,} | {source} | {licence} |"
        )
    return "\n".join(rows)


def heldout_rows(kinds: dict[str, dict[str, float]]) -> str:
    """The table of held-out figures."""
    return "\n".join(
        f"| {kind} | {row['bytes']:,} | {row['xz_bits_per_byte']:.3f} | {row['model_bits_per_byte']:.3f} "
        f"| {row['nats_per_token']:.3f} |"
        for kind, row in kinds.items()
    )


def samples(texts: dict[str, str]) -> str:
    """Prompts and what the model wrote after them."""
    return "\n".join(f"```text\n{prompt}⟶{text}\n```\n" for prompt, text in texts.items())
