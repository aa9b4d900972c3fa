"""Policies beside each other on one machine with one budget: a cell of a sweep, with ratios to the references."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from foregate.errors import ForegateError
from foregate.memory.budget import count_slots
from foregate.schedule import BOUNDS, POLICIES, make_scheduler
from foregate.schedule.base import Prefetches
from foregate.simulate.machine import Machine
from foregate.simulate.run import Outcome, run
from foregate.simulate.workload import Workload

CLAIRVOYANT = "clairvoyant"
REFERENCES = ("lru", "mixtral-offloading", CLAIRVOYANT, "clairvoyant-horizon", "clairvoyant-determined")
VARIANTS = {CLAIRVOYANT: (CLAIRVOYANT, "clairvoyant-patient")}  # the bound is what the better one reaches


@dataclass(frozen=True)
class Result:
    """One policy in one cell. Ratios are of tokens/s, to the references that were simulated in the same cell."""

    memory: str
    slots: int
    link_bandwidth: float  # bytes/s
    policy: str
    tokens_per_second: float
    hit_rate: float | None
    loads_per_token: float
    prefetches: Prefetches
    stall_share: float
    link_share: float
    ratios: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_policies(policies: Iterable[str]) -> None:
    """Raise ForegateError for a name that is no policy."""
    for policy in policies:
        if policy not in POLICIES and policy not in BOUNDS:
            raise ForegateError(f"unknown policy {policy}: choose among {', '.join((*POLICIES, *BOUNDS))}")


def simulate_cells(
    workload: Workload,
    policies: Sequence[str],
    memory: Sequence[str],
    links: Sequence[float],
    machine: Machine,
    *,
    warm_up: int = 0,
    time_scale: float = 1.0,
) -> Iterator[list[Result]]:
    """Every budget on every link (bytes/s), one list of results a cell. Times are multiplied by `time_scale`.

    A budget in bytes is for experts alone: a trace knows nothing of a backbone. Raises ForegateError for an unknown
    policy, gates that are missing, and a budget that is too small.
    """
    check_policies(policies)
    experts, top_k = workload.num_experts, max(workload.shape.top_k)
    budgets = {text: count_slots(text, experts, top_k, machine.record_bytes) for text in memory}
    for link in links:
        for text, slots in budgets.items():
            here = replace(machine, link_bandwidth=link)
            outcomes = {policy: simulate(workload, policy, slots, here, warm_up) for policy in policies}
            yield [_result(text, slots, link, policy, outcomes, time_scale) for policy in outcomes]


def simulate(workload: Workload, policy: str, slots: int, machine: Machine, warm_up: int = 0) -> Outcome:
    """One policy; the clairvoyant bound is the better of its variants."""
    outcomes = []
    for variant in VARIANTS.get(policy, (policy,)):
        scheduler = make_scheduler(variant, slots, workload.shape, workload.future)
        outcomes.append(run(workload.calls(variant), scheduler, machine, warm_up))
    return max(outcomes, key=lambda outcome: outcome.tokens_per_second)


def _result(
    memory: str, slots: int, link: float, policy: str, outcomes: dict[str, Outcome], time_scale: float
) -> Result:
    outcome = outcomes[policy]
    speed = outcome.tokens_per_second
    references = {name: outcomes[name].tokens_per_second for name in REFERENCES if name in outcomes}
    return Result(
        memory=memory,
        slots=slots,
        link_bandwidth=link,
        policy=policy,
        tokens_per_second=speed / time_scale,
        hit_rate=outcome.hit_rate,
        loads_per_token=outcome.loads / outcome.tokens if outcome.tokens else 0.0,
        prefetches=outcome.prefetches,
        stall_share=outcome.stall_share,
        link_share=outcome.link_share,
        ratios={name: speed / other for name, other in references.items() if other},
    )
