"""The engine's schedulers under a virtual clock: what a machine made of numbers would do with recorded routing."""

from foregate.simulate.machine import Machine
from foregate.simulate.run import Outcome, run

__all__ = ["Machine", "Outcome", "run"]
