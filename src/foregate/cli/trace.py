"""`foregate trace`: what every router of a model sees and chooses on texts, on disk."""

import time
from pathlib import Path

import typer

from foregate.cli.generate import MEMORY_HELP, POLICY_HELP, THREADS_HELP
from foregate.config import EngineConfig, TraceConfig

NAME = "trace"


def run(
    store: Path = typer.Argument(..., metavar="STORE", help="Folder of a converted model."),
    text: list[Path] = typer.Option(..., help="UTF-8 text file; may be given several times."),
    out: Path = typer.Option(..., help="Folder of the trace; must not exist yet."),
    max_tokens: int = typer.Option(TraceConfig.max_tokens, help="Tokens over all texts, in equal shares; 0: no limit."),
    window: int = typer.Option(TraceConfig.window, help="Tokens of a sequence."),
    generate: int = typer.Option(
        TraceConfig.generate, help="Let the model continue the first half of each window by so many tokens of its own."
    ),
    seed: int = typer.Option(TraceConfig.seed, help="Seed of what the model writes."),
    memory: str = typer.Option(EngineConfig.memory, help=MEMORY_HELP),
    policy: str = typer.Option(EngineConfig.policy, help=POLICY_HELP),
    threads: int = typer.Option(EngineConfig.threads, help=THREADS_HELP),
) -> None:
    """Record what a model's routers are given, how they score the experts and which are used, token by token.

    The model need not fit into memory. Interrupted or killed, run the same command again: it resumes.
    """
    from foregate import load
    from foregate.checkpoint.store import Store
    from foregate.checkpoint.workspace import check_destination
    from foregate.cli.progress import count_progress
    from foregate.lookahead.record import plan_trace, read_texts, record_trace
    from foregate.model.generate import load_tokenizer

    Store(store)  # what is wrong with folders and texts is said before anything is loaded
    check_destination(out)
    texts = read_texts(load_tokenizer(str(store)), text)
    model = load(store, memory=memory, policy=policy, threads=threads)
    plan = plan_trace(model, texts, window=window, max_tokens=max_tokens, generate=generate, seed=seed)
    header = plan.header
    print(
        f"{header.num_tokens:,} tokens in {len(header.sequences):,} sequences, {len(header.layers)} MoE layers: the trace "
        f"will take {plan.nbytes / 2**20:,.1f} MiB ({header.nbytes // header.num_tokens:,} bytes a token)",
        flush=True,
    )
    start = time.perf_counter()
    with count_progress("recording", "tokens") as progress:
        path = record_trace(plan, out, progress)
    print(f"{path}: recorded in {time.perf_counter() - start:.1f} s")
