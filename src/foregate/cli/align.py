"""`foregate align`: train the gates that foresee which experts the next layers will use."""

import sys
import time
from pathlib import Path

import typer

from foregate.cli.generate import MEMORY_HELP, THREADS_HELP
from foregate.config import AlignConfig, EngineConfig, TraceConfig

NAME = "align"


def run(
    store: Path = typer.Argument(..., metavar="STORE", help="Folder of a converted model."),
    text: list[Path] = typer.Option([], help="UTF-8 text file to learn from; may be given several times."),
    trace: Path = typer.Option(None, metavar="DIR", help="Trace of this model to learn from, instead of texts."),
    horizon: int = typer.Option(AlignConfig.horizon, help="MoE layers that each gate looks ahead."),
    width: int = typer.Option(
        AlignConfig.width, help=f"Width of the gates; by default what {AlignConfig.share:.0%} of the backbone allow."
    ),
    max_tokens: int = typer.Option(AlignConfig.max_tokens, help="Tokens of texts or trace to use; 0: no limit."),
    device: str = typer.Option(AlignConfig.device, help="What trains the gates: cpu, cuda or auto."),
    window: int = typer.Option(TraceConfig.window, help="With --text: tokens of a sequence."),
    memory: str = typer.Option(EngineConfig.memory, help=f"With --text: {MEMORY_HELP}"),
    scratch: Path = typer.Option(
        None, metavar="DIR", help="With --text: folder for the temporary trace; by default where the store lies."
    ),
    threads: int = typer.Option(EngineConfig.threads, help=THREADS_HELP),
) -> None:
    """Train the lookahead gates of a model: small heads that foresee the experts of the next layers.

    The model itself does not change. The gates are written into the store. Interrupted or killed, run the same command
    again: it resumes.
    """
    from foregate import align
    from foregate.cli.progress import count_progress

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
