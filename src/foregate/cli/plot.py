"""`foregate plot`: what runs did, in pictures."""

from pathlib import Path
from typing import Annotated

import typer

from foregate.config import ReportConfig

NAME = "plot"
EXAMPLE = "foregate plot run.json -o pictures"


def run(
    reports: Annotated[list[Path], typer.Argument(metavar="REPORT", help="Files that generate --report wrote.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for the pictures; made if need be.")
    ],
    format: Annotated[
        str, typer.Option(metavar="NAMES", help="Of the pictures: png, svg, pdf; several as png,svg.")
    ] = ReportConfig.formats,
    tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens that the picture of the time line shows.")
    ] = ReportConfig.tokens,
    first: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="The first of them, counted from 0 at the time line's start; by default a typical stretch.",
        ),
    ] = None,
) -> None:
    """Draw what runs did: time line, hit rate and recall, bytes read, experts; several runs also beside each other.

    trace.json is the whole time line for https://ui.perfetto.dev. Of a single report a summary goes to stdout.
    """
    from foregate.cli.units import split_list
    from foregate.report.plots import PlotSettings, plot_reports
    from foregate.report.read import read_report
    from foregate.report.summary import summarise

    runs = [read_report(path) for path in reports]
    settings = PlotSettings(split_list(format, "--format"), tokens, first)
    written = plot_reports(runs, output, settings)
    if len(runs) == 1:
        print(summarise(runs[0]) + "\n")
    print(f"{output}: {', '.join(path.name for path in written)}")
