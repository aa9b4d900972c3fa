"""`foregate doctor`: what this machine can do, what works on it, and how to mend what does not."""

import json
import sys
from pathlib import Path

import typer

NAME = "doctor"


def run(
    store: Path = typer.Argument(
        None, metavar="[STORE]", help="Store whose disk is measured; else the current folder's."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON, for scripts and for foregate plan --machine."),
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
