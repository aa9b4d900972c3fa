"""`foregate align`: train the gates that foresee which experts the next layers will use."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from foregate.cli import options
from foregate.config import AlignConfig, EngineConfig, TraceConfig

NAME = "align"
EXAMPLE = "foregate align model.store --text text.txt"


def run(
    model: options.Model,
    text: options.Texts = [],
    trace: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Trace of this model to learn from, instead of texts.")
    ] = None,
    horizon: Annotated[
        int, typer.Option(metavar="N", help="MoE layers that each gate looks ahead.")
    ] = AlignConfig.horizon,
    width: Annotated[
        int | None,
        typer.Option(
            metavar="N", help=f"Width of the gates; by default what {AlignConfig.share:.0%} of the backbone allow."
        ),
    ] = AlignConfig.width,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens of texts or trace to use; 0: no limit.")
    ] = AlignConfig.max_tokens,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="What trains the gates: cpu, cuda or auto.")
    ] = AlignConfig.device,
    window: options.Window = TraceConfig.window,
    memory: options.MemoryOfText = EngineConfig.memory,
    scratch: options.Scratch = None,
    threads: options.Threads = EngineConfig.threads,
    bits: options.Bits = None,
    yes: options.Yes = False,
) -> None:
    """Train the lookahead gates of a model: small heads that foresee the experts of the next layers.

    The model itself does not change. The gates are written into the store. Interrupted or killed, run the same command
    again: it resumes.
    """
    from foregate import align
    from foregate.cli.models import open_model
    from foregate.cli.progress import count_progress

    store = open_model(model, bits, yes)
    start = time.perf_counter()
    try:
        with count_progress("aligning", "") as progress:

            def report(source, done: int, total: int) -> None:
                pairs = zip(source.top_k, source.untrained_recall, source.recall, strict=True)
                print(f"{source.name}: {' / '.join(f'recall@{k} {u:.3f} -> {r:.3f}' for k, u, r in pairs)}", flush=True)
                progress(done, total)

            path = align(
                store,
                texts=text,
                trace=trace,
                horizon=horizon,
                width=width,
                max_tokens=max_tokens,
                device=device,
                threads=threads,
                window=window,
                memory=memory,
                scratch=scratch,
                recording=progress,
                announce=lambda line: print(line, flush=True),
                report=report,
            )
    except KeyboardInterrupt:
        print("foregate: interrupted: what is finished is kept, run the same command again", file=sys.stderr)
        raise typer.Exit(130) from None
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB in {time.perf_counter() - start:.1f} s")
