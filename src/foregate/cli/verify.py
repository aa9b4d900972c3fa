"""`foregate verify`: every byte of a store against its checksums."""

from pathlib import Path

import typer

NAME = "verify"


def run(store: Path = typer.Argument(..., metavar="STORE", help="Folder of a converted model.")) -> None:
    """Check every record of a store against its checksum."""
    from foregate import verify
    from foregate.cli.progress import byte_progress

    with byte_progress("verifying") as progress:
        count = verify(store, progress)
    print(f"{store}: {count} records and the backbone are intact")
