"""Schedulers by name. Neither torch nor I/O."""

from collections.abc import Sequence

from foregate.errors import ForegateError
from foregate.schedule.base import (
    GATES,
    NEXT_ROUTER,
    Action,
    Call,
    Cancel,
    Compute,
    ExpertKey,
    Hurry,
    Load,
    Prediction,
    Scheduler,
    Shape,
)
from foregate.schedule.clairvoyant import (
    ClairvoyantDeterminedScheduler,
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
    "clairvoyant-determined": ClairvoyantDeterminedScheduler,
}
POLICIES: dict[str, type[Scheduler]] = {
    "demand": DemandScheduler,
    "lru": LruScheduler,
    "mixtral-offloading": MixtralOffloadingScheduler,
    "mixtral-offloading-code": MixtralOffloadingCodeScheduler,
    "lookahead": LookaheadScheduler,
}
AUTO = "auto"  # lookahead where a store has gates, otherwise lru
_TAKEN = frozenset({AUTO, *POLICIES, *BOUNDS})


def register(name: str, policy: type[Scheduler]) -> None:
    """Add a policy of your own under `name`: `foregate.load`, the simulator and the benches then take it like the rest.

    The class is called with (slots, shape). Registered again, a name stands for the newer class. Raises ForegateError
    for the name of a policy that comes with Foregate, TypeError for what is no scheduler's class.
    """
    if not (isinstance(policy, type) and issubclass(policy, Scheduler)):
        raise TypeError(f"{policy!r} is not a subclass of foregate.schedule.Scheduler")
    if name in _TAKEN:
        raise ForegateError(f"there is a policy {name} already: register yours under another name")
    POLICIES[name] = policy


def told_by(policy: str) -> str | None:
    """What predicts for the policy called `policy`: GATES, NEXT_ROUTER or nothing. Raises ForegateError for no policy."""
    return (BOUNDS[policy] if policy in BOUNDS else _find(policy)).told_by


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
    return _find(policy)(slots, shape)


def _find(policy: str) -> type[Scheduler]:
    if policy not in POLICIES:
        raise ForegateError(f"unknown policy {policy}: choose one of {', '.join(sorted(POLICIES))}")
    return POLICIES[policy]


__all__ = [
    "AUTO",
    "BOUNDS",
    "GATES",
    "NEXT_ROUTER",
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
    "register",
    "told_by",
]
