"""The recorder against the scheduler's and the link's own counts, and against a recount of the engine's calls."""

import errno
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import foregate
from foregate.errors import ForegateError
from foregate.memory import disk
from foregate.memory.link import Finished
from foregate.report import Recorder
from foregate.report.prefetches import PrefetchCounts
from foregate.report.recorder import total
from foregate.schedule import Load, Prediction

POLICIES = ["lru", "mixtral-offloading", "mixtral-offloading-code", "lookahead", "clairvoyant", "clairvoyant-patient"]


@pytest.mark.parametrize("policy", POLICIES)
def test_routing_against_the_calls(run: Callable[[str], Any], policy: str) -> None:
    calls, recorder = run(policy).calls, run(policy).recorder
    chosen = Counter((call.layer, expert) for call in calls for expert in call.experts)
    assert chosen == {
        (layer, expert): count for layer, row in enumerate(recorder.chosen) for expert, count in enumerate(row) if count
    }
    assert [sum(row) for row in recorder.missed] == [counts.misses for counts in recorder.layers]
    assert [sum(row) for row in recorder.chosen] == [counts.hits + counts.misses for counts in recorder.layers]
    for chosen_row, missed_row in zip(recorder.chosen, recorder.missed, strict=True):
        assert all(missed <= count for missed, count in zip(missed_row, chosen_row, strict=True))


@pytest.mark.parametrize("policy", POLICIES)
def test_prefetches_are_what_the_scheduler_counts_and_bytes_add_up(run: Callable[[str], Any], policy: str) -> None:
    seen = run(policy)
    counts = PrefetchCounts(*(sum(values) for values in zip(*map(astuple, seen.recorder.prefetches), strict=True)))
    assert astuple(counts)[:4] == astuple(seen.prefetches)
    assert (counts.started > 0) == (policy not in ("lru", "mixtral-offloading-code"))
    assert sum(layer.bytes_read for layer in seen.recorder.layers) == seen.bytes_moved
    assert counts.useful_bytes == counts.in_time * seen.record_bytes
    assert counts.late_bytes == counts.late * seen.record_bytes
    assert counts.wasted_bytes <= counts.wasted * seen.record_bytes  # a cancelled load may have moved a part
    unused = counts.started - counts.in_time - counts.late - counts.wasted
    assert counts.unused_bytes == unused * seen.record_bytes
    assert unused <= len(seen.resident)


def test_a_prefetch_that_the_host_forestalls_is_counted_as_the_scheduler_counts_it(demo_store: Path) -> None:
    """Its expert is computed on the host while it is under way: it goes on, for later."""
    options = {"device": "simulated", "memory": "25%", "policy": "lookahead", "link_latency": 0.004, "threads": 1}
    model = foregate.load(demo_store, **options)
    with closing(model.foregate) as engine:
        model.generate(torch.arange(50, 62)[None], max_new_tokens=12, min_new_tokens=12, do_sample=False)
        engine.settle()
        while engine.scheduler.in_flight():
            time.sleep(0.01)
        assert engine.recorder.totals().experts_on_host > 0
        counted = total(engine.recorder.prefetches, PrefetchCounts)
        assert astuple(counted)[:4] == astuple(engine.scheduler.prefetches)


def test_each_fate_of_a_prefetch() -> None:
    recorder = Recorder([4])
    arrive = lambda expert, nbytes=10, **how: recorder.loaded(Finished((0, expert), nbytes, 0.0, **how))  # noqa: E731
    route = lambda *experts, **how: recorder.routed(0, experts, experts, 1, **how)  # noqa: E731
    recorder.submitted(Load((0, 0), slot=0, demand=False))
    arrive(0)
    route(0)  # in time
    recorder.submitted(Load((0, 1), slot=1, demand=False))
    route(1)
    arrive(1)  # late
    recorder.submitted(Load((0, 2), slot=2, demand=False))
    arrive(2, nbytes=4, dropped=True)  # cancelled
    recorder.submitted(Load((0, 2), slot=2, demand=False))
    arrive(2)
    recorder.submitted(Load((0, 3), slot=2))  # in its place
    arrive(3)
    recorder.submitted(Load((0, 2), slot=3, demand=False))
    route(2, on_host=[2])
    arrive(2)  # not used yet
    (counts,) = recorder.prefetches
    assert counts == PrefetchCounts(5, 1, 1, 2, bytes_moved=44, useful_bytes=10, late_bytes=10, wasted_bytes=14)
    assert counts.unused_bytes == 10
    assert recorder.layers[0].bytes_read == 54
    recorder.emptied()
    assert (counts.wasted, counts.unused_bytes) == (3, 0)


def test_after_an_error_no_prefetch_is_left_open(demo_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = foregate.load(demo_store, memory="25%", policy="lookahead", threads=1, link_bandwidth=20e6)
    with closing(model.foregate) as engine:
        model.generate(torch.arange(50, 62)[None], max_new_tokens=6, do_sample=False)
        engine.expect(Prediction(11, ((0, np.zeros(8)), (1, np.ones(8)), (2, np.zeros(8)))))
        while engine.scheduler.in_flight():
            time.sleep(0.01)
        assert total(engine.recorder.prefetches, PrefetchCounts).unused_bytes > 0

        def fail(*arguments: object) -> int:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(disk, "RETRY_PAUSES", ())
        monkeypatch.setattr(disk.os, "preadv", fail)
        with pytest.raises(ForegateError, match="cannot be read"), torch.inference_mode():
            model(torch.arange(100, 140)[None])
        counts = total(engine.recorder.prefetches, PrefetchCounts)
        assert counts.started == counts.in_time + counts.late + counts.wasted > 0
        assert counts.unused_bytes == 0


def test_what_it_keeps_does_not_grow() -> None:
    recorder, layers = Recorder([8]), 1
    predictions = [Prediction(layer, (((layer + 1) % layers, np.full(8, 0.3)),)) for layer in range(layers)]

    def write(tokens: int) -> int:
        for token in range(tokens):
            for layer in range(layers):
                key = layer, token % 8
                recorder.submitted(Load(key, slot=token % 5, demand=token % 2 == 0))
                recorder.loaded(Finished(key, 10, 0.0))
                recorder.routed(layer, [token % 7, 7], [7], 1)
                recorder.predicted(predictions[layer])
                recorder.computed(layer, 2, 0.0)
        recorder.foresight.scores()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    recorder.record_timeline(300)
    before = write(200)
    after = write(10_000)
    tracemalloc.stop()
    assert after - before < 20_000  # bytes
    timeline = recorder.timeline.to_json()
    assert sum(len(timeline[kind]) for kind in timeline["columns"]) == 300
    assert timeline["events"] == 10_200 * (3 * layers + 1)
    assert recorder.totals().hits == 10_200 * layers
