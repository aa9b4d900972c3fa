"""What the server counts, for Prometheus: requests and tokens here, experts as the engine's recorder has them."""

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from foregate.config import ServeConfig

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
        fates = CounterMetricFamily(
            "foregate_prefetches",
            "Experts fetched before a router chose them, by what became of them.",
            labels=["fate"],
        )
        for fate, count in asdict(self._engine.scheduler.prefetches).items():
            fates.add_metric([fate], count)
        yield fates
        load = self._load()
        yield GaugeMetricFamily("foregate_replies_running", "Replies being made.", load["running"])
        yield GaugeMetricFamily("foregate_replies_waiting", "Replies in the queue.", load["waiting"])
        yield GaugeMetricFamily("foregate_slots", "Experts that memory has room for.", self._engine.budget.slots)
        yield GaugeMetricFamily(
            "foregate_tokens_per_second",
            f"Tokens generated a second, over the last {ServeConfig.rate_seconds:g} s.",
            self._metrics.tokens_per_second,
        )
