"""The doctor's findings as a table."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

MARKS = {"ok": "ok", "slow": "[yellow]slow[/yellow]", "broken": "[bold red]broken[/bold red]"}


def print_report(report: Any) -> None:
    """report: a `doctor.Report`."""
    console = Console(highlight=False)
    installed = [f"{name} {version}" for name, version in report.versions.items() if version]
    console.print(f"{report.machine['system']}; {', '.join(installed)}")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("", "", "", "found"):
        table.add_column(column, no_wrap=column != "found")
    topic = None
    for check in sorted(report.checks, key=lambda check: _topics(report).index(check.topic)):
        table.add_row("" if check.topic == topic else check.topic, check.name, MARKS[check.state], check.found)
        if check.mend:
            table.add_row("", "", "", f"→ {check.mend}")
        topic = check.topic
    console.print(table)
    console.print(
        "Foregate can be used here." if report.usable else "[bold red]Something is broken: mend it first.[/bold red]"
    )


def _topics(report: Any) -> list[str]:
    """In the order in which they were looked at."""
    return list(dict.fromkeys(check.topic for check in report.checks))
