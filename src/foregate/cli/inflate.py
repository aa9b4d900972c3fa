"""`foregate inflate`: a small model becomes a wide one that computes the same function."""

import time
from pathlib import Path
from typing import Annotated

import typer

from foregate.cli import options

NAME = "inflate"
EXAMPLE = "foregate inflate demo/mixtral-tiny wide --hidden 1024 --ffn 2048"


def run(
    source: options.Source,
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="Where the checkpoint will be; must not exist yet.")
    ],
    hidden: Annotated[int, typer.Option(metavar="N", help="The new hidden size: a multiple of the model's.")],
    ffn: Annotated[int, typer.Option(metavar="N", help="The new inner size of the experts: a multiple of theirs.")],
) -> None:
    """Widen a small trained MoE checkpoint into a large one that computes the same function.

    For benchmarks: routing and text of the trained model at the bytes and operations of a large one.
    """
    from foregate.checkpoint.inflate import inflate
    from foregate.cli.progress import byte_progress

    start = time.perf_counter()
    with byte_progress("inflating") as progress:
        path = inflate(source, destination, hidden=hidden, ffn=ffn, progress=progress)
    files = sorted(path.glob("*-of-*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    print(
        f"{path}: {size / 2**20:.1f} MiB in {len(files)} file{'s' * (len(files) > 1)}, in {time.perf_counter() - start:.1f} s"
    )
