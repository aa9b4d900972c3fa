"""JSON files: written whole or not at all, a row of numbers on one line."""

import json
import os
import re
from pathlib import Path

from foregate.errors import ForegateError

# A list of scalars as json.dumps lays it out. A string holds no line breaks, so this begins and ends outside of one.
ROW = re.compile(r"\[\n\s+([^\[\]{}]*?)\n\s+\]")


def write_report(report: dict, path: str | Path) -> None:
    """Write a report as JSON, whole or not at all. Raises ForegateError when the place cannot be written."""
    write_whole(to_text(report), Path(path))


def write_whole(text: str, path: Path) -> None:
    """Write a text file, whole or not at all. Raises ForegateError when the place cannot be written."""
    temporary = path.with_name(path.name + ".new")
    try:
        if path.exists() and not path.is_file():  # a pipe or a device is written to, not replaced
            path.write_text(text)
            return
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ForegateError(f"cannot write {path}: {error.strerror}") from None


def to_text(report: dict) -> str:
    """A report as JSON text."""
    return ROW.sub(lambda row: f"[{re.sub(chr(10) + ' *', ' ', row[1])}]", json.dumps(report, indent=1)) + "\n"


def deliver(report: dict, path: Path | None, as_json: bool) -> None:
    """A command's result for machines: into the file `path` if there is one, on stdout if `as_json`."""
    if path is not None:
        write_report(report, path)
    if as_json:
        print(to_text(report), end="")


def check_report_path(path: Path) -> None:
    """Raise ForegateError now for a place where no report could be written later."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ForegateError(f"no such folder for the report: {folder}")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise ForegateError(f"cannot write the report {path}: name a file that can be written")
