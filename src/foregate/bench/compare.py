"""Settings beside each other: interleaved repetitions, medians and spread, ratios within a repetition."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from foregate.bench.live import Measurement, Setting
from foregate.errors import ForegateError

Measure = Callable[[Setting], Measurement]
Runs = dict[str, list[Measurement]]  # setting's name -> one measurement a repetition


@dataclass(frozen=True)
class Spread:
    """A figure over repetitions."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        values = list(values)
        return cls(median(values), min(values), max(values))


def interleave(settings: Sequence[Setting], repeats: int, measure: Measure) -> Runs:
    """Every setting once a repetition: A B C, then B C A, ... A drift of the machine then meets all of them alike.

    Raises ForegateError if the text is not the same in all runs: what computes another text cannot be compared.
    """
    if repeats < 1:
        raise ForegateError(f"--repeats {repeats}: at least 1 is needed")
    runs: Runs = {setting.name: [] for setting in settings}
    for repetition in range(repeats):
        start = repetition % len(settings)
        for setting in (*settings[start:], *settings[:start]):
            runs[setting.name].append(measure(setting))
    check_same_text(runs)
    return runs


def check_same_text(runs: Runs) -> None:
    """Raise ForegateError if any two runs wrote different tokens."""
    texts = {name: {run.token_ids for run in measured} for name, measured in runs.items()}
    first = next(iter(texts))
    for name, found in texts.items():
        if found != texts[first] or len(found) != 1:
            raise ForegateError(f"{name} wrote another text than {first}: nothing is compared; please report this")


def best_of(runs: Runs, names: Sequence[str]) -> list[Measurement]:
    """In each repetition the fastest of these settings."""
    return [max(row, key=lambda run: run.tokens_per_second) for row in zip(*(runs[n] for n in names), strict=True)]


def paired_ratio(runs: Sequence[Measurement], others: Sequence[Measurement]) -> float:
    """The median over repetitions of how many times as fast these runs were as the others of the same repetition."""
    return median(a.tokens_per_second / b.tokens_per_second for a, b in zip(runs, others, strict=True))


def summarise(name: str, runs: Runs, references: Sequence[str]) -> dict[str, Any]:
    """A setting's figures for a table and for JSON; medians where there are several. Shares are of decode time."""
    measured = runs[name]
    loads = [run.foreign_load for run in measured if run.foreign_load is not None]
    precision = [run.precision for run in measured if run.precision is not None]
    return {
        "name": name,
        "tokens_per_second": vars(Spread.of(run.tokens_per_second for run in measured)),
        "hit_rate": median(run.hit_rate for run in measured),
        "prefetch_precision": median(precision) if precision else None,
        "bytes_per_token": median(run.counts.bytes_moved / run.counts.tokens for run in measured),
        "stall_share": median(run.counts.stall_seconds / run.counts.seconds for run in measured),
        "link_share": median(run.counts.link_seconds / run.counts.seconds for run in measured),
        "ratios": {other: paired_ratio(measured, runs[other]) for other in references if other in runs},
        "foreign_load": max(loads, default=None),
        "runs": [run.to_json() for run in measured],
    }
