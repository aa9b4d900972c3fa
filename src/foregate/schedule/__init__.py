"""Schedulers by name. Neither torch nor I/O."""

from collections.abc import Sequence

from foregate.errors import ForegateError
from foregate.schedule.base import Action, Call, Cancel, Compute, ExpertKey, Hurry, Load, Prediction, Scheduler, Shape
from foregate.schedule.clairvoyant import (
    ClairvoyantHorizonScheduler,
    ClairvoyantScheduler,
    PatientClairvoyantScheduler,
    Route,
)
from foregate.schedule.demand import DemandScheduler
from foregate.schedule.lookahead import LookaheadScheduler
from foregate.schedule.lru import LruScheduler
from foregate.schedule.mixtral_offloading import MixtralOffloadingCodeScheduler, MixtralOffloadingScheduler
from foregate.schedule.placement import Costs, Placement

BOUNDS: dict[str, type[ClairvoyantScheduler | ClairvoyantHorizonScheduler]] = {
    "clairvoyant": ClairvoyantScheduler,
    "clairvoyant-patient": PatientClairvoyantScheduler,
    "clairvoyant-horizon": ClairvoyantHorizonScheduler,
}
POLICIES: dict[str, type[Scheduler]] = {
    "demand": DemandScheduler,
    "lru": LruScheduler,
    "mixtral-offloading": MixtralOffloadingScheduler,
    "mixtral-offloading-code": MixtralOffloadingCodeScheduler,
    "lookahead": LookaheadScheduler,
}


def make_scheduler(policy: str, slots: int, shape: Shape, future: Sequence[Route] | None = None) -> Scheduler:
    """The scheduler called `policy` over `slots` slots. The bounds are told the `future`, every call to come.

    Raises ForegateError for an unknown name, and for a bound without a future.
    """
    if policy in BOUNDS:
        if future is None:
            raise ForegateError(
                f"policy {policy} must know the future: it runs in foregate simulate and foregate bench"
            )
        return BOUNDS[policy](slots, shape, future)
    if policy not in POLICIES:
        raise ForegateError(f"unknown policy {policy}: choose one of {', '.join(sorted(POLICIES))}")
    return POLICIES[policy](slots, shape)


__all__ = [
    "BOUNDS",
    "POLICIES",
    "Action",
    "Call",
    "Cancel",
    "Compute",
    "Costs",
    "ExpertKey",
    "Hurry",
    "Load",
    "Placement",
    "Prediction",
    "Route",
    "Scheduler",
    "Shape",
    "make_scheduler",
]
