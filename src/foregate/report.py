"""What a run did, as numbers: counters while it runs, one JSON report after it."""

import json
import os
import platform
import tempfile
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from foregate.errors import ForegateError
from foregate.memory.process import peak_memory_bytes

REPORT_VERSION = 2


@dataclass
class LayerCounts:
    """One MoE layer's traffic. Experts are counted once per layer call, however many tokens chose them."""

    hits: int = 0
    misses: int = 0  # not resident when routed; prefetches under way are among them
    bytes_read: int = 0
    stall_seconds: float = 0.0  # compute stood still for a load
    kernel_calls: int = 0
    experts_computed: int = 0
    kernel_seconds: float = 0.0


@dataclass
class Recorder:
    """Counts what the engine does."""

    num_layers: int
    layers: list[LayerCounts] = field(init=False)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self.layers = [LayerCounts() for _ in range(self.num_layers)]

    def routed(self, layer: int, hits: int, misses: int) -> None:
        self.layers[layer].hits += hits
        self.layers[layer].misses += misses

    def loaded(self, layer: int, nbytes: int) -> None:
        self.layers[layer].bytes_read += nbytes

    def stalled(self, layer: int, seconds: float) -> None:
        self.layers[layer].stall_seconds += seconds

    def computed(self, layer: int, experts: int, seconds: float) -> None:
        counts = self.layers[layer]
        counts.kernel_calls += 1
        counts.experts_computed += experts
        counts.kernel_seconds += seconds

    def totals(self) -> LayerCounts:
        """All layers together."""
        return LayerCounts(*(sum(values) for values in zip(*map(astuple, self.layers), strict=True)))


def build_report(engine: Any, settings: dict[str, Any], tokens: dict[str, int], seconds: dict[str, float]) -> dict:
    """The report of one run: settings, machine, speed, traffic over all and by layer. Times in seconds, sizes in bytes."""
    from foregate import __version__

    totals, used = engine.recorder.totals(), engine.budget
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
            "read_path": "direct" if engine.direct_reads else "buffered",
            "kernel": f"{engine.kernel.name} ({engine.kernel_note})",
        },
        "prefetches": asdict(engine.scheduler.prefetches),
        "policy": engine.scheduler.facts(),
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
        "by_layer": [asdict(layer) for layer in engine.recorder.layers],
    }


def _busy_shares(seconds: float, stall_seconds: float, link_seconds: float) -> dict[str, Any]:
    """Shares of a run's time in which processor and link were at work, and which of the two bounds it."""
    if seconds <= 0:
        return {"processor": None, "link": None, "bound": None}
    processor, link = 1 - stall_seconds / seconds, min(link_seconds / seconds, 1.0)
    return {"processor": processor, "link": link, "bound": "link" if link > processor else "processor"}


def write_report(report: dict, path: str | Path) -> None:
    """Write a report as JSON, whole or not at all. Raises ForegateError when the place cannot be written."""
    path, text = Path(path), json.dumps(report, indent=1) + "\n"
    try:
        if path.exists() and not path.is_file():  # a pipe or a device is written to, not replaced
            path.write_text(text)
            return
        with tempfile.NamedTemporaryFile("w", dir=path.absolute().parent, delete=False) as stream:
            stream.write(text)
        Path(stream.name).replace(path)
    except OSError as error:
        raise ForegateError(f"cannot write the report {path}: {error.strerror}") from None


def check_report_path(path: Path) -> None:
    """Raise ForegateError now for a place where no report could be written later."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ForegateError(f"no such folder for the report: {folder}")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise ForegateError(f"cannot write the report {path}: name a file that can be written")
