"""Reports read back: checked once here, so that pictures and summaries need not ask what is there."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from foregate.errors import ForegateError
from foregate.report.build import REPORT_VERSION
from foregate.report.foresight import LAYER, TOKEN, Aim, Score
from foregate.report.prefetches import KINDS, PrefetchCounts
from foregate.report.recorder import LayerCounts, total
from foregate.report.timeline import COLUMNS

Counts = TypeVar("Counts", LayerCounts, PrefetchCounts, Score)
Rows = dict[str, list[dict[str, Any]]]  # kind of event -> events, by COLUMNS of the time line


@dataclass(frozen=True)
class RunReport:
    """One run's report. Times in seconds, sizes in bytes, but for the time line's."""

    name: str  # the file's, without its ending
    store: str
    policy: str
    memory: str
    slots: int
    experts: int
    prompt_tokens: int
    new_tokens: int
    seconds: float  # of prompt and decode
    tokens_per_second: float | None
    link_seconds: float
    layers: Sequence[LayerCounts]
    prefetches: Sequence[PrefetchCounts]
    scores: Mapping[Aim, Score]
    chosen: Sequence[Sequence[int]]  # [layer][expert]: calls that used it
    missed: Sequence[Sequence[int]]
    timeline: Rows | None

    @property
    def totals(self) -> LayerCounts:
        """All layers together."""
        return total(self.layers, LayerCounts)

    @property
    def prefetched(self) -> PrefetchCounts:
        """All layers together."""
        return total(self.prefetches, PrefetchCounts)

    @property
    def hit_rate(self) -> float:
        """Of experts routed, those that were resident."""
        return self.totals.hits / max(self.totals.hits + self.totals.misses, 1)

    @property
    def stall_share(self) -> float:
        """Of prompt and decode, the time that compute stood still."""
        return self.totals.stall_seconds / self.seconds if self.seconds else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes read for each new token, those of the prompt's pass among them."""
        return self.totals.bytes_read / max(self.new_tokens, 1)


def read_report(path: Path) -> RunReport:
    """Raises ForegateError for a file that is no report, is damaged, or has another version's form."""
    try:
        report = json.loads(path.read_text())
    except OSError as error:
        raise ForegateError(f"cannot read the report {path}: {error.strerror}") from None
    except ValueError:
        raise ForegateError(f"{path} is no JSON file: name one that generate --report wrote") from None
    version = report.get("report_version") if isinstance(report, dict) else None
    if version is None:
        raise ForegateError(f"{path} is no report of a run: name a file that generate --report wrote")
    if version != REPORT_VERSION:
        raise ForegateError(
            f"{path} is a report of version {version}, this Foregate reads {REPORT_VERSION}: write it anew with generate --report"
        )
    try:
        return _parse(path.stem, report)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ForegateError(f"{path} is damaged ({error!r}): write it anew with generate --report") from None


def _parse(name: str, report: dict[str, Any]) -> RunReport:
    layers, experts = report["by_layer"], [len(row) for row in report["routing"]["chosen"]]
    if len(experts) != len(layers) or not all(experts):
        raise ValueError("layers without experts")
    speed = report["tokens_per_second"]
    return RunReport(
        name=name,
        store=str(report["model"]["store"]),
        policy=str(report["settings"]["policy"]),
        memory=str(report["settings"]["memory"]),
        slots=_number(report["memory"]["slots"]),
        experts=_number(report["model"]["experts"]),
        prompt_tokens=_number(report["tokens"]["prompt"]),
        new_tokens=_number(report["tokens"]["generated"]),
        seconds=_number(report["seconds"]["first_token"]) + _number(report["seconds"]["decode"]),
        tokens_per_second=None if speed is None else _number(speed),
        link_seconds=_number(report["link"]["busy_seconds"]),
        layers=[_counts(LayerCounts, row) for row in layers],
        prefetches=[_counts(PrefetchCounts, row["prefetches"]) for row in layers],
        scores={_aim(row, len(layers)): _counts(Score, row) for row in report["predictions"]["by_layer"]},
        chosen=_table(report["routing"]["chosen"], experts),
        missed=_table(report["routing"]["missed"], experts),
        timeline=None if report["timeline"] is None else _timeline(report["timeline"], len(layers)),
    )


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise TypeError(f"{value!r} is no number of anything")
    return value


def _counts(kind: type[Counts], row: dict[str, Any]) -> Counts:
    return kind(**{field.name: _number(row[field.name]) for field in fields(kind)})


def _aim(row: dict[str, Any], layers: int) -> Aim:
    if row["source"] not in (LAYER, TOKEN) or not 0 <= row["layer"] < layers:
        raise ValueError(f"a prediction from {row['source']!r} for layer {row['layer']!r}")
    return Aim(row["layer"], row["source"], _number(row["horizon"]))


def _table(rows: list[list[int]], widths: list[int]) -> list[list[int]]:
    if [len(row) for row in rows] != widths:
        raise ValueError("experts are missing in a layer")
    return [[_number(value) for value in row] for row in rows]


def _timeline(events: dict[str, Any], layers: int) -> Rows:
    rows: Rows = {}
    for kind, columns in COLUMNS.items():
        rows[kind] = [dict(zip(columns, row, strict=True)) for row in events[kind]]
        for row in rows[kind]:
            if row.get("kind", KINDS[0]) not in KINDS or row.get("layer", 0) not in range(layers):
                raise ValueError(f"{kind} {row}")
            row.update({name: _number(value) for name, value in row.items() if name != "kind"})
    return rows
