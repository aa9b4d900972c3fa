"""What a run did: counters while it runs, one JSON report after it, and pictures of that."""

from foregate.report.build import REPORT_VERSION, build_report
from foregate.report.files import check_report_path, deliver, to_text, write_report
from foregate.report.recorder import LayerCounts, Recorder

__all__ = [
    "REPORT_VERSION",
    "LayerCounts",
    "Recorder",
    "build_report",
    "check_report_path",
    "deliver",
    "to_text",
    "write_report",
]
