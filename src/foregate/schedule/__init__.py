"""Schedulers by name. Pure Python: no torch, no I/O."""

from foregate.errors import ForegateError
from foregate.schedule.base import ExpertKey, Load, Scheduler
from foregate.schedule.demand import DemandScheduler
from foregate.schedule.lookahead import LookaheadScheduler
from foregate.schedule.lru import LruScheduler

POLICIES: dict[str, type[Scheduler]] = {
    "demand": DemandScheduler,
    "lru": LruScheduler,
    "lookahead": LookaheadScheduler,
}


def make_scheduler(policy: str, slots: int) -> Scheduler:
    """The scheduler called `policy` over `slots` slots. Raises ForegateError for an unknown name."""
    if policy not in POLICIES:
        raise ForegateError(f"unknown policy {policy}: choose one of {', '.join(sorted(POLICIES))}")
    return POLICIES[policy](slots)


__all__ = ["POLICIES", "ExpertKey", "Load", "Scheduler", "make_scheduler"]
