"""What the server counts, for Prometheus: requests and tokens here, experts as the engine's recorder has them."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from foregate.config import ServeConfig
from foregate.report.foresight import SURE, Foresight, by_horizon
from foregate.report.prefetches import PrefetchCounts

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "foregate_requests", "HTTP requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.prompt_tokens = Counter("foregate_prompt_tokens", "Prompt tokens taken in.", registry=self.registry)
        self.generated_tokens = Counter("foregate_generated_tokens", "Tokens generated.", registry=self.registry)
        self.replies = Counter("foregate_replies", "Replies by how they ended.", ["outcome"], registry=self.registry)
        self.first_token = Histogram(
            "foregate_first_token_seconds",
            "From a reply's arrival in the queue to its first token.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.step = Histogram(
            "foregate_step_seconds", "One decode step of all running replies.", buckets=SECONDS, registry=self.registry
        )
        self._recent: deque[tuple[float, int]] = deque()  # (when, tokens) of the steps in the last seconds

    def generated(self, count: int) -> None:
        """`count` tokens were just generated."""
        self.generated_tokens.inc(count)
        now = time.monotonic()
        self._recent.append((now, count))
        while self._recent and self._recent[0][0] < now - ServeConfig.rate_seconds:
            self._recent.popleft()

    def finished(self, outcome: str) -> None:
        """A reply ended: done, cancelled or failed."""
        self.replies.labels(outcome).inc()

    @property
    def tokens_per_second(self) -> float:
        """Tokens generated in the last seconds, over the time since the first of them; 0 when there were none."""
        now = time.monotonic()
        recent = [(when, count) for when, count in tuple(self._recent) if when > now - ServeConfig.rate_seconds]
        return sum(count for _, count in recent) / max(now - recent[0][0], 0.1) if recent else 0.0

    def watch(self, engine: Any, load: Callable[[], dict[str, int]]) -> None:
        """Report this engine's experts and the queue whenever the metrics are read."""
        self.registry.register(_Watched(engine, load, self))

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


class _Watched(Collector):
    def __init__(self, engine: Any, load: Callable[[], dict[str, int]], metrics: Metrics) -> None:
        self._engine, self._load, self._metrics = engine, load, metrics

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        counts = self._engine.recorder.layers
        for name, what, field in (
            ("foregate_expert_hits", "Experts that were resident when a router chose them.", "hits"),
            ("foregate_expert_misses", "Experts that had to be read when a router chose them.", "misses"),
            ("foregate_expert_read_bytes", "Bytes of experts read.", "bytes_read"),
            ("foregate_stall_seconds", "Time that computing stood still for experts.", "stall_seconds"),
        ):
            family = CounterMetricFamily(name, what, labels=["layer"])
            for layer, values in enumerate(counts):
                family.add_metric([str(layer)], getattr(values, field))
            yield family
        yield from _prefetch_families(self._engine.recorder.prefetches)
        yield from _prediction_families(self._engine.recorder.foresight)
        load = self._load()
        yield GaugeMetricFamily("foregate_replies_running", "Replies being made.", load["running"])
        yield GaugeMetricFamily("foregate_replies_waiting", "Replies in the queue.", load["waiting"])
        yield GaugeMetricFamily("foregate_slots", "Experts that memory has room for.", self._engine.budget.slots)
        yield GaugeMetricFamily(
            "foregate_tokens_per_second",
            f"Tokens generated a second, over the last {ServeConfig.rate_seconds:g} s.",
            self._metrics.tokens_per_second,
        )


def _prefetch_families(layers: Sequence[PrefetchCounts]) -> Iterable[CounterMetricFamily]:
    """Prefetches by layer and fate; those that were started and are in none of them are not used yet."""
    started = CounterMetricFamily("foregate_prefetches_started", "Experts fetched ahead of a router.", labels=["layer"])
    ended = CounterMetricFamily(
        "foregate_prefetches",
        "Experts fetched ahead whose fate is known: resident when routed, still under way, or not used at all.",
        labels=["layer", "fate"],
    )
    moved = CounterMetricFamily(
        "foregate_prefetched_bytes", "Bytes read for prefetches whose fate is known.", labels=["layer", "fate"]
    )
    for layer, counts in enumerate(layers):
        name = str(layer)
        started.add_metric([name], counts.started)
        for fate, records, nbytes in (
            ("in_time", counts.in_time, counts.useful_bytes),
            ("late", counts.late, counts.late_bytes),
            ("wasted", counts.wasted, counts.wasted_bytes),
        ):
            ended.add_metric([name, fate], records)
            moved.add_metric([name, fate], nbytes)
    return started, ended, moved


def _prediction_families(foresight: Foresight) -> Iterable[CounterMetricFamily]:
    """Counters to divide: recall@k is found / chosen, precision right / sure."""
    families = {
        name: CounterMetricFamily(f"foregate_predicted_experts_{name}", what, labels=["source", "horizon"])
        for name, what in (
            ("chosen", "Experts that a router chose for a single token after a prediction of its choice."),
            ("found", "Those of them that were among the k likeliest, where k were chosen."),
            ("sure", f"Experts given a probability of at least {SURE:g} by a prediction for a single token."),
            ("right", "Those of them that were chosen."),
        )
    }
    for (source, horizon), score in by_horizon(foresight.scores()).items():
        for name, family in families.items():
            family.add_metric([source, str(horizon)], getattr(score, name))
    return families.values()
