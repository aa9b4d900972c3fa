"""`foregate bench policies`: policies on this machine, interleaved, with the bounds beside them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from foregate.bench.compare import best_of, check_same_text, interleave, summarise
from foregate.bench.live import Measurement, Script, Setting, measure
from foregate.checkpoint.store import Store
from foregate.config import EngineConfig
from foregate.model.generate import load_tokenizer
from foregate.schedule import BOUNDS, Call, Route
from foregate.simulate.cells import CLAIRVOYANT, VARIANTS, check_policies

REFERENCES = ("lru", "mixtral-offloading", "mixtral-offloading-code", CLAIRVOYANT, "clairvoyant-horizon")
Announce = Callable[[str], None]
Watch = Callable[[Any, Callable[[], bool]], None]


@dataclass(frozen=True)
class Bench:
    """What all runs over one store have in common."""

    store: Path
    script: Script
    threads: int = EngineConfig.threads
    allow_buffered: bool = False
    announce: Announce = lambda line: None

    def measure(self, setting: Setting, watch: Watch | None = None) -> Measurement:
        """One run, announced."""
        self.announce(f"{self.store.name}: {setting.name}, --memory {setting.memory}")
        return measure(
            self.store,
            load_tokenizer(str(self.store)),
            setting,
            self.script,
            threads=self.threads,
            allow_buffered=self.allow_buffered,
            watch=watch,
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

    `clairvoyant` is in each repetition the better of its variants. Raises ForegateError for an unknown policy, a budget
    that is too small, and a text that depends on the policy.
    """
    check_policies(policies)
    Store(bench.store)
    reference, calls = bench.record(memory[-1])
    future = [(call.layer, call.experts) for call in calls]
    for link in links:
        for budget in memory:
            settings = _settings(policies, budget, link, future)
            runs = interleave(settings, repeats, bench.measure)
            check_same_text({"the recording": [reference], **runs})
            if CLAIRVOYANT in policies:
                runs[CLAIRVOYANT] = best_of(runs, VARIANTS[CLAIRVOYANT])
            facts = {"memory": budget, "link_bandwidth": link}
            yield [{**facts, **summarise(policy, runs, REFERENCES)} for policy in policies]


def _settings(policies: Sequence[str], memory: str, link: float | None, future: Sequence[Route]) -> list[Setting]:
    names = dict.fromkeys(variant for policy in policies for variant in VARIANTS.get(policy, (policy,)))
    plain = (Setting(name, name, memory, link) for name in names)
    return [replace(setting, future=future) if setting.policy in BOUNDS else setting for setting in plain]
