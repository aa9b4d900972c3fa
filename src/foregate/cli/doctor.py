"""`foregate doctor`: what this machine can do, what works on it, and how to mend what does not."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from foregate.cli import completion, options

NAME = "doctor"
EXAMPLE = "foregate doctor model.store"


def run(
    store: Annotated[
        Path | None,
        typer.Argument(
            metavar="[STORE]",
            help="Store whose disk is measured; else the current folder's.",
            autocompletion=completion.models,
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Look at machine, versions, kernels, bandwidths, storage and limits, and test that it computes right. Takes seconds.

    Exit code 1 when something is broken, 0 when Foregate can be used, be it slowly.
    """
    from foregate.doctor import examine

    report = examine(store)
    if as_json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        from foregate.cli.doctor_table import print_report

        print_report(report)
    if not report.usable:
        sys.exit(1)
