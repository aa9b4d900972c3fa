"""Pictures of reports, and the same as a trace for Perfetto. `plot_reports` writes all there are."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from foregate.config import ReportConfig
from foregate.drawing import FORMATS, require_matplotlib
from foregate.errors import ForegateError
from foregate.report.chrome import chrome_trace
from foregate.report.files import write_whole
from foregate.report.layout import window
from foregate.report.read import RunReport

TRACE = "trace.json"


@dataclass(frozen=True)
class PlotSettings:
    """What is drawn. `first`: the token, of those the time line has kept, where its picture begins."""

    formats: Sequence[str] = (ReportConfig.formats,)
    tokens: int = ReportConfig.tokens
    first: int | None = None


def plot_reports(reports: Sequence[RunReport], folder: Path, settings: PlotSettings) -> list[Path]:
    """Draw each report, and with several their comparison, into a folder that is made if need be. Returns the files.

    With several reports, each one's files begin with its name. Raises ForegateError without matplotlib, for formats there
    are not, for a folder that cannot be written, for reports of the same name.
    """
    require_matplotlib("plot")
    endings = [f".{name.lower().removeprefix('.')}" for name in settings.formats]
    if unknown := [ending for ending in endings if ending not in FORMATS]:
        raise ForegateError(f"--format {unknown[0][1:]}: there are {', '.join(name[1:] for name in FORMATS)}")
    if settings.tokens < 1:
        raise ForegateError(f"--tokens {settings.tokens}: at least 1 is needed")
    names = [report.name for report in reports]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ForegateError(f"two reports are called {min(twice)}: rename one, for their pictures are named after them")
    if folder.exists() and not folder.is_dir():
        raise ForegateError(f"-o {folder} is a file: name a folder")
    pictures = [_pictures(report, settings) for report in reports]
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for report, own in zip(reports, pictures, strict=True):
            prefix = f"{report.name}-" if len(reports) > 1 else ""
            for name, draw in own.items():
                written += _paths(folder, prefix + name, endings)
                draw(*written[-len(endings) :])
            if report.timeline is not None:
                written.append(folder / f"{prefix}{TRACE}")
                write_whole(json.dumps(chrome_trace(report), separators=(",", ":")), written[-1])
        if len(reports) > 1:
            from foregate.report.plots.comparison import plot_comparison

            written += _paths(folder, "comparison", endings)
            plot_comparison(reports, *written[-len(endings) :])
    except OSError as error:
        raise ForegateError(f"cannot write into {folder}: {error.strerror or error}") from None
    return written


def _pictures(report: RunReport, settings: PlotSettings) -> dict[str, Callable[..., None]]:
    from foregate.report.plots.predictions import plot_predictions
    from foregate.report.plots.routing import plot_routing
    from foregate.report.plots.timeline import plot_timeline
    from foregate.report.plots.traffic import plot_traffic

    pictures: dict[str, Callable[..., None]] = {
        "predictions": partial(plot_predictions, report),
        "traffic": partial(plot_traffic, report),
        "routing": partial(plot_routing, report),
    }
    if report.timeline is not None:
        shown = window(report, settings.tokens, settings.first)
        if shown is not None:
            pictures["timeline"] = partial(plot_timeline, report, *shown)
        elif settings.first is not None:
            raise ForegateError(
                f"--first {settings.first}: {report.name} has no {settings.tokens} tokens from there on in its time line"
            )
    return pictures


def _paths(folder: Path, name: str, endings: Sequence[str]) -> list[Path]:
    return [folder / f"{name}{ending}" for ending in endings]
