"""What all pictures share: size of type, file formats, hatches and greys. They read the same without colour."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from foregate.errors import ForegateError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
DPI = 150
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "foregate",
}
INK, DARK, MIDDLE, LIGHT, RULE = "#1d3557", "#457b9d", "#a8bccb", "#e8edf1", "#dddddd"


@contextmanager
def picture(size: tuple[float, float], *paths: Path) -> Iterator[Figure]:
    """An empty figure of `size` inches to draw into, saved to all paths at the end. Raises OSError."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        for path in paths:
            undated = {"Date": None} if path.suffix.lower() == ".svg" else None  # the same report, the same file
            figure.savefig(path, dpi=DPI, metadata=undated)


def check_plot(path: Path) -> None:
    """Raise ForegateError unless a picture of this name can be drawn here."""
    if path.suffix.lower() not in FORMATS:
        raise ForegateError(f"--plot {path}: the name must end with {', '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise ForegateError(f"--plot {path}: there is no folder {path.absolute().parent}")
    require_matplotlib("--plot")


def require_matplotlib(who: str) -> None:
    """Raise ForegateError, with the mend, where `who` cannot draw."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ForegateError(f'{who} needs matplotlib: pip install "foregate[plot]"') from None
