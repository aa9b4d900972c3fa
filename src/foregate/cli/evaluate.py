"""`foregate evaluate`: perplexity and bits per byte of texts."""

import json
from pathlib import Path
from typing import Annotated

import typer

from foregate.cli import options
from foregate.config import EngineConfig, EvaluateConfig

NAME = "evaluate"
EXAMPLE = "foregate evaluate model.store --text held-out.txt --memory 50%"


def run(
    model: options.Model,
    text: options.Texts,
    window: Annotated[int, typer.Option(metavar="N", help="Tokens the model sees at a time.")] = EvaluateConfig.window,
    stride: Annotated[int, typer.Option(metavar="N", help="Tokens the window moves on by.")] = EvaluateConfig.stride,
    memory: options.Memory = EngineConfig.memory,
    policy: options.Policy = EngineConfig.policy,
    threads: options.Threads = EngineConfig.threads,
    kernel: options.Kernel = EngineConfig.kernel,
    exact: options.Exact = EngineConfig.exact,
    as_json: options.Json = False,
    bits: options.Bits = None,
    yes: options.Yes = False,
) -> None:
    """Measure how well a model predicts texts: perplexity, and bits per byte."""
    from foregate import load
    from foregate.cli.models import open_model
    from foregate.cli.progress import count_progress
    from foregate.model.evaluate import evaluate
    from foregate.model.generate import load_tokenizer

    store = open_model(model, bits, yes)
    tokenizer = load_tokenizer(str(store))
    loaded = load(store, memory=memory, policy=policy, threads=threads, kernel=kernel, exact=exact)
    rows = []
    for file in text:
        with count_progress(file.name, "tokens") as progress:
            result = evaluate(loaded, tokenizer, file, window=window, stride=stride, progress=progress)
        rows.append(
            {
                "text": result.text,
                "bytes": result.bytes,
                "tokens": result.tokens,
                "perplexity": result.perplexity,
                "bits_per_byte": result.bits_per_byte,
            }
        )
    print(json.dumps(rows, indent=1) if as_json else _table(rows))


def _table(rows: list[dict]) -> str:
    lines = [f"{'text':<32} {'bytes':>10} {'tokens':>9} {'perplexity':>11} {'bits/byte':>10}"]
    for row in rows:
        name = Path(row["text"]).name[:32]
        lines.append(
            f"{name:<32} {row['bytes']:>10,} {row['tokens']:>9,} {row['perplexity']:>11.3f} {row['bits_per_byte']:>10.4f}"
        )
    return "\n".join(lines)
