"""`foregate bench`: measurements of this machine, beside alternatives in the same run."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from foregate.cli import bench_live, options
from foregate.cli.options import example_line
from foregate.config import EngineConfig

NAME = "bench"
app = typer.Typer(help="Measure this machine, beside the alternatives in the same run.", no_args_is_help=True)
for command, example in bench_live.COMMANDS.items():
    app.command(epilog=example_line(example))(command)


@app.callback()
def _group() -> None:
    pass


@app.command(epilog=example_line("foregate bench kernels --shape olmoe --bits 4 --bits 2"))
def kernels(
    shape: Annotated[
        str, typer.Option(metavar="NAME", help="Matrix of an expert of: mixtral, olmoe, qwen3 or gpt-oss.")
    ] = "mixtral",
    bits: Annotated[list[int], typer.Option(metavar="BITS", help="Bits per weight; may be given several times.")] = [
        4,
        3,
        2,
        8,
    ],
    tokens: Annotated[list[int], typer.Option(metavar="N", help="Tokens at a time; may be given several times.")] = [
        1,
        4,
        16,
    ],
    threads: options.Threads = EngineConfig.threads,
    as_json: options.Json = False,
) -> None:
    """Time products and whole experts from quantized records, in milliseconds, beside PyTorch and a plain read of memory."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from foregate.kernels import cpu, set_threads
    from foregate.kernels.bench import SHAPES, bench_kernels

    if threads:
        set_threads(threads)
    bandwidth, timings = bench_kernels(shape, bits, tokens)
    if as_json:
        rows = [{**asdict(timing), "gigabytes_per_second": timing.gigabytes_per_second} for timing in timings]
        facts = {"shape": shape, "rows_cols": SHAPES[shape], "isa": cpu.isa(), "threads": cpu.threads()}
        print(json.dumps({**facts, "read_gigabytes_per_second": bandwidth, "timings": rows}, indent=1))
        return
    title = f"{shape} {SHAPES[shape]}, {cpu.isa()}, {cpu.threads()} threads; plain read {bandwidth:.1f} GB/s"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("kernel", "tokens", "ms", "best", "GB/s", "of a read"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for timing in timings:
        speed = timing.gigabytes_per_second
        milliseconds = (f"{timing.median:.2f}", f"{timing.fastest:.2f}")
        table.add_row(timing.name, str(timing.tokens), *milliseconds, f"{speed:.1f}", f"{speed / bandwidth:.0%}")
    Console().print(table)
