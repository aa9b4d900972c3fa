"""`foregate bench policies`: policies on this machine, interleaved, with the bounds beside them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from foregate.bench.compare import best_of, check_same_text, interleave, summarise
from foregate.bench.live import Measurement, Place, Script, Setting, TokenIds, measure
from foregate.checkpoint.store import Store
from foregate.errors import ForegateError
from foregate.model.generate import load_tokenizer
from foregate.schedule import BOUNDS, Call, Route
from foregate.simulate.cells import CLAIRVOYANT, VARIANTS, check_policies

PLACED = "+host"  # after a policy's name: on a device, missed experts are computed on the host where that is faster
REFERENCES = (
    *("lru", "mixtral-offloading", "mixtral-offloading-code"),
    *(CLAIRVOYANT, "clairvoyant-horizon", "clairvoyant-determined"),
)
Announce = Callable[[str], None]
Watch = Callable[[Any, Callable[[], bool]], None]


@dataclass(frozen=True)
class Bench:
    """What all runs over one store have in common."""

    store: Path
    script: Script
    place: Place = field(default_factory=Place)
    allow_buffered: bool = False
    announce: Announce = lambda line: None

    def measure(self, setting: Setting, watch: Watch | None = None, forced: TokenIds | None = None) -> Measurement:
        """One run, announced; arguments as those of `live.measure`."""
        self.announce(f"{self.store.name}: {setting.name}, --memory {setting.memory}")
        return measure(
            self.store,
            load_tokenizer(str(self.store)),
            setting,
            self.script,
            place=self.place,
            allow_buffered=self.allow_buffered,
            watch=watch,
            forced=forced,
        )

    def record(self, memory: str) -> tuple[Measurement, list[Call]]:
        """The text and every call of a layer, by a run that no figure is taken from."""
        calls: list[Call] = []

        def start(model: Any, counting: Callable[[], bool]) -> None:
            nonlocal calls
            calls = model.foregate.record_calls()

        measured = self.measure(Setting("recording", "lru", memory), start)
        return measured, calls


def bench_policies(
    bench: Bench, policies: Sequence[str], memory: Sequence[str], links: Sequence[float | None], repeats: int
) -> Iterator[list[dict[str, Any]]]:
    """Every budget on every link (bytes/s; None: the disk as it is), one list of rows a cell.

    `clairvoyant` is in each repetition the better of its variants. What is computed on the host rounds otherwise, so a
    "+host" setting is made to write the others' text. Raises ForegateError for an unknown policy, a budget that is too
    small, and a text that depends on the policy.
    """
    check_policies(policy.removesuffix(PLACED) for policy in policies)
    if any(policy.endswith(PLACED) for policy in policies) and not bench.place.on_device:
        raise ForegateError(f"{PLACED} needs experts on a device: add --device cuda, or --device simulated")
    Store(bench.store)
    reference, calls = bench.record(memory[-1])
    future = [(call.layer, call.experts) for call in calls]
    for link in links:
        for budget in memory:
            settings = _settings(policies, budget, link, future)
            runs = interleave(
                settings,
                repeats,
                lambda setting: bench.measure(setting, forced=reference.token_ids if setting.placed else None),
            )
            check_same_text({"the recording": [reference], **runs})
            if CLAIRVOYANT in policies:
                runs[CLAIRVOYANT] = best_of(runs, VARIANTS[CLAIRVOYANT])
            facts = {"memory": budget, "link_bandwidth": link}
            yield [{**facts, **summarise(policy, runs, REFERENCES)} for policy in policies]


def _settings(policies: Sequence[str], memory: str, link: float | None, future: Sequence[Route]) -> list[Setting]:
    names = dict.fromkeys(variant for policy in policies for variant in VARIANTS.get(policy, (policy,)))
    plain = (Setting(name, name.removesuffix(PLACED), memory, link, placed=name.endswith(PLACED)) for name in names)
    return [replace(setting, future=future) if setting.policy in BOUNDS else setting for setting in plain]
