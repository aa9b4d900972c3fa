"""Where a model's bytes will go, and how fast it may be, before anything is downloaded, converted or loaded."""

from foregate.planner.plan import Plan, plan

__all__ = ["Plan", "plan"]
