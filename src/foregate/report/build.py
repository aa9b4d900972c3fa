"""The report of one run, as JSON takes it. docs/report.md explains every field."""

import os
import platform
from dataclasses import asdict, replace
from typing import Any

import torch
import transformers

from foregate.memory.process import peak_memory_bytes
from foregate.report.foresight import Aim, Score, by_horizon
from foregate.report.prefetches import PrefetchCounts
from foregate.report.recorder import LayerCounts, total

REPORT_VERSION = 3


def build_report(engine: Any, settings: dict[str, Any], tokens: dict[str, int], seconds: dict[str, float]) -> dict:
    """The report of one run: settings, machine, speed, traffic over all and by layer. Times in seconds, sizes in bytes."""
    from foregate import __version__

    engine.settle()
    recorder, used = engine.recorder, engine.budget
    layers, prefetches = [replace(c) for c in recorder.layers], [replace(c) for c in recorder.prefetches]
    totals = total(layers, LayerCounts)
    routed = totals.hits + totals.misses
    decode_steps = tokens["generated"] - 1  # the first token comes from the prompt's pass
    return {
        "report_version": REPORT_VERSION,
        "foregate": __version__,
        "model": {
            "store": str(engine.store.path),
            "class": engine.store.manifest.model_class,
            "bits": engine.store.manifest.bits,
            "quantizer": engine.store.manifest.quantizer,
            "backbone_bits": engine.store.manifest.backbone_bits,
            "layers": len(engine.store.layers),
            "experts": engine.store.num_experts,
        },
        "settings": settings,
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": decode_steps / seconds["decode"] if decode_steps > 0 and seconds["decode"] > 0 else None,
        "experts": {
            **asdict(totals),
            "hit_rate": totals.hits / routed if routed else None,
            "read_path": engine.link.path,
            "kernel": engine.kernel_summary,
        },
        "prefetches": _prefetches(total(prefetches, PrefetchCounts)),
        "predictions": _predictions(recorder.foresight.scores()),
        "policy": engine.scheduler.facts(),
        "device": engine.device_facts,
        "link": {"busy_seconds": engine.link.busy_seconds, "bytes_moved": engine.link.bytes_moved},
        "busy": _busy_shares(
            seconds["first_token"] + seconds["decode"], totals.stall_seconds, engine.link.busy_seconds
        ),
        "memory": {
            "slots": used.slots,
            "slot_bytes": used.slot_bytes,
            "backbone_bytes": used.backbone_bytes,
            "planned_bytes": used.total_bytes,
            "planned": used.needs.parts | {"slots": used.slots_bytes},
            "peak_resident_bytes": peak_memory_bytes(),
        },
        "by_layer": [
            {**asdict(own), "prefetches": _prefetches(fetched)} for own, fetched in zip(layers, prefetches, strict=True)
        ],
        "routing": {"chosen": recorder.chosen, "missed": recorder.missed},
        "timeline": recorder.timeline.to_json() if recorder.timeline else None,
    }


def _prefetches(counts: PrefetchCounts) -> dict[str, int]:
    return {**asdict(counts), "unused_bytes": counts.unused_bytes}


def _predictions(scores: dict[Aim, Score]) -> dict[str, list[dict]]:
    return {
        "by_horizon": [_score(*kind, score) for kind, score in by_horizon(scores).items()],
        "by_layer": [{"layer": aim.layer, **_score(aim.source, aim.horizon, score)} for aim, score in scores.items()],
    }


def _score(source: str, horizon: int, score: Score) -> dict[str, Any]:
    shares = {"recall": score.recall, "precision": score.precision}
    return {"source": source, "horizon": horizon, **asdict(score), **shares}


def _busy_shares(seconds: float, stall_seconds: float, link_seconds: float) -> dict[str, Any]:
    """Shares of a run's time in which processor and link were at work, and which of the two bounds it."""
    if seconds <= 0:
        return {"processor": None, "link": None, "bound": None}
    processor, link = 1 - stall_seconds / seconds, min(link_seconds / seconds, 1.0)
    return {"processor": processor, "link": link, "bound": "link" if link > processor else "processor"}
