"""`foregate evaluate`: perplexity and bits per byte of texts."""

import json
from pathlib import Path

import typer

from foregate.cli.generate import EXACT_HELP, KERNEL_HELP, MEMORY_HELP, POLICY_HELP, THREADS_HELP
from foregate.config import EngineConfig, EvaluateConfig

NAME = "evaluate"


def run(
    store: Path = typer.Argument(..., metavar="STORE", help="Folder of a converted model."),
    text: list[Path] = typer.Option(..., help="UTF-8 text file; may be given several times."),
    window: int = typer.Option(EvaluateConfig.window, help="Tokens the model sees at a time."),
    stride: int = typer.Option(EvaluateConfig.stride, help="Tokens the window moves on by."),
    memory: str = typer.Option(EngineConfig.memory, help=MEMORY_HELP),
    policy: str = typer.Option(EngineConfig.policy, help=POLICY_HELP),
    threads: int = typer.Option(EngineConfig.threads, help=THREADS_HELP),
    kernel: str = typer.Option(EngineConfig.kernel, help=KERNEL_HELP),
    exact: bool = typer.Option(EngineConfig.exact, help=EXACT_HELP),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
) -> None:
    """Measure how well a model predicts texts: perplexity, and bits per byte."""
    from foregate import load
    from foregate.checkpoint.store import Store
    from foregate.cli.progress import count_progress
    from foregate.model.evaluate import evaluate
    from foregate.model.generate import load_tokenizer

    Store(store)
    tokenizer = load_tokenizer(str(store))
    model = load(store, memory=memory, policy=policy, threads=threads, kernel=kernel, exact=exact)
    rows = []
    for file in text:
        with count_progress(file.name, "tokens") as progress:
            result = evaluate(model, tokenizer, file, window=window, stride=stride, progress=progress)
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
