"""Runs of the demo model, once per test process: what the engine saw, what its recorder counted, the report of it."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import foregate
from foregate.config import ReportConfig
from foregate.report import Recorder, build_report, write_report
from foregate.schedule import Call
from foregate.schedule.base import Prefetches

PROMPT_TOKENS, NEW_TOKENS = 12, 24
BANDWIDTH = 20e6  # bytes/s: slow enough that there is much to wait for and to foresee


@dataclass
class Run:
    """What is known of one run, from several sides."""

    recorder: Recorder
    calls: list[Call]
    prefetches: Prefetches  # as the scheduler counts them
    resident: set[tuple[int, int]]  # records at the end
    bytes_moved: int  # by the link
    record_bytes: int
    report: dict[str, Any]


@pytest.fixture(scope="session")
def run(demo_store: Path) -> Callable[[str], Run]:
    """run(policy): the demo model has written NEW_TOKENS tokens under this policy. Not to be changed by a test."""
    made: dict[str, Run] = {}

    def make(policy: str) -> Run:
        if policy not in made:
            future = None
            if policy.startswith("clairvoyant"):
                future = [(call.layer, call.experts) for call in make("lru").calls]
            made[policy] = _run(demo_store, policy, future)
        return made[policy]

    return make


@pytest.fixture
def report_file(run: Callable[[str], Run], tmp_path: Path) -> Callable[[str], Path]:
    """report_file(policy): the report of such a run, as a file POLICY.json in the test's folder."""

    def write(policy: str) -> Path:
        path = tmp_path / f"{policy}.json"
        write_report(run(policy).report, path)
        return path

    return write


def _run(store: Path, policy: str, future: list | None) -> Run:
    model = foregate.load(store, memory="25%", policy=policy, threads=1, link_bandwidth=BANDWIDTH, future=future)
    engine = model.foregate
    with closing(engine):
        engine.recorder.record_timeline(ReportConfig.events)
        calls, start = engine.record_calls(), time.perf_counter()
        prompt = torch.arange(50, 50 + PROMPT_TOKENS)[None]
        model.generate(prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
        seconds = time.perf_counter() - start
        while engine.scheduler.in_flight():
            time.sleep(0.01)
        report = build_report(
            engine,
            {"policy": policy, "memory": "25%"},
            {"prompt": PROMPT_TOKENS, "generated": NEW_TOKENS},
            {"load": 1.0, "first_token": seconds / 2, "decode": seconds / 2},
        )
        resident = {
            (layer, expert)
            for layer, info in enumerate(engine.store.layers)
            for expert in range(info.num_experts)
            if engine.scheduler.is_resident((layer, expert))
        }
        moved = engine.link.bytes_moved
    return Run(engine.recorder, calls, engine.scheduler.prefetches, resident, moved, engine.store.record_bytes, report)
