"""What this machine can do, what of Foregate works on it, and how to mend what does not."""

from foregate.doctor.report import Report, examine

__all__ = ["Report", "examine"]
