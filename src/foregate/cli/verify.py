"""`foregate verify`: every byte of a store against its checksums."""

from pathlib import Path

import typer

from foregate.cli.progress import byte_progress

NAME = "verify"


def run(store: Path = typer.Argument(..., metavar="STORE", help="Folder of a converted model.")) -> None:
    """Check every record of a store against its checksum."""
    from foregate import verify

    with byte_progress("verifying") as progress:
        count = verify(store, progress)
    print(f"{store}: {count} records and the backbone are intact")
