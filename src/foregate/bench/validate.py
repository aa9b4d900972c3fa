"""`foregate bench validate`: the simulator against the engine, on the same calls with the machine measured beside them."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from foregate.bench.live import Measurement, Setting
from foregate.bench.policies import Bench
from foregate.bench.steps import StepWatch, machine_of
from foregate.checkpoint.store import Store
from foregate.errors import ForegateError
from foregate.memory.budget import count_slots
from foregate.schedule import BOUNDS, Shape, make_scheduler
from foregate.simulate import Machine, Outcome, run
from foregate.simulate.cells import check_policies


@dataclass(frozen=True)
class Validation:
    """One setting, live and simulated."""

    store: str
    setting: Setting
    live: Measurement
    simulated: Outcome
    machine: Machine

    @property
    def ratio(self) -> float:
        """Simulated tokens/s over live tokens/s."""
        return self.simulated.tokens_per_second / self.live.tokens_per_second

    def to_json(self) -> dict[str, Any]:
        setting, live, simulated = self.setting, self.live, self.simulated
        facts = {"policy": setting.policy, "memory": setting.memory, "link_bandwidth": setting.link_bandwidth}
        speeds = {"live": live.tokens_per_second, "simulated": simulated.tokens_per_second, "ratio": self.ratio}
        details = {"measurement": live.to_json(), "outcome": asdict(simulated), "machine": asdict(self.machine)}
        return {"store": self.store, **facts, **speeds, **details}


def validate(
    bench: Bench, policies: Sequence[str], memory: Sequence[str], links: Sequence[float | None]
) -> Iterator[Validation]:
    """Each setting once: live, then its own calls on the machine measured in that very run.

    What is tested is therefore the schedule in time: which loads there are, and how much of them compute hides. Raises
    ForegateError for an unknown policy, a budget that is too small, and more than one prompt.
    """
    check_policies(policies)
    if len(bench.script.prompts) > 1:
        raise ForegateError("the simulator is compared with one text: give one prompt")
    store = Store(bench.store)
    shape = Shape(tuple(layer.num_experts for layer in store.layers), tuple(layer.top_k for layer in store.layers))
    future = [(call.layer, call.experts) for call in bench.record(memory[-1])[1]] if BOUNDS.keys() & policies else None
    for link in links:
        for budget in memory:
            for policy in policies:
                setting, watch = Setting(policy, policy, budget, link), StepWatch()
                live = bench.measure(replace(setting, future=future if policy in BOUNDS else None), watch)
                moved = live.counts.bytes_moved / live.counts.link_seconds if live.counts.link_seconds else link or 1e9
                machine = machine_of(watch, store.record_bytes, moved, paced=link is not None)
                slots = count_slots(budget, store.num_experts, store.top_k, store.record_bytes)
                scheduler = make_scheduler(policy, slots, shape, future)
                outcome = run(watch.calls, scheduler, machine, warm_up=1 + bench.script.warm_up)  # the prompt is one
                yield Validation(store.path.name, setting, live, outcome, machine)
