"""`foregate trace`: what every router of a model sees and chooses on texts, on disk."""

import time
from pathlib import Path
from typing import Annotated

import typer

from foregate.cli import options
from foregate.config import EngineConfig, TraceConfig

NAME = "trace"
EXAMPLE = "foregate trace model.store --text text.txt --out model.trace"


def run(
    model: options.Model,
    text: options.Texts,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the trace; must not exist yet.")],
    max_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens over all texts, in equal shares; 0: no limit.")
    ] = TraceConfig.max_tokens,
    window: Annotated[int, typer.Option(metavar="N", help="Tokens of a sequence.")] = TraceConfig.window,
    generate: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Let the model continue the first half of each window by so many tokens of its own.",
        ),
    ] = TraceConfig.generate,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of what the model writes.")] = TraceConfig.seed,
    memory: options.Memory = EngineConfig.memory,
    policy: options.Policy = EngineConfig.policy,
    threads: options.Threads = EngineConfig.threads,
    bits: options.Bits = None,
    yes: options.Yes = False,
) -> None:
    """Record what a model's routers are given, how they score the experts and which are used, token by token.

    The model need not fit into memory. Interrupted or killed, run the same command again: it resumes.
    """
    from foregate import load
    from foregate.checkpoint.workspace import check_destination
    from foregate.cli.models import open_model
    from foregate.cli.progress import count_progress
    from foregate.lookahead.record import plan_trace, read_texts, record_trace
    from foregate.model.generate import load_tokenizer

    check_destination(out)  # what is wrong with folders and texts is said before anything is loaded
    store = open_model(model, bits, yes)
    texts = read_texts(load_tokenizer(str(store)), text)
    loaded = load(store, memory=memory, policy=policy, threads=threads)
    plan = plan_trace(loaded, texts, window=window, max_tokens=max_tokens, generate=generate, seed=seed)
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
