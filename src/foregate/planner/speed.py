"""How fast a plan may be: its times from bandwidths, its misses from recorded routing, through the simulator.

A decode step reads the backbone, the cache and top-k experts a layer from memory, and what is missing over the link: on a
device from host memory, and what that has no room for from the disk. The routing is not the model's own: it is that of
the demo models, whose layers and experts stand for as many of the planned model as make bytes and time per token right. So
a speed is a range over both routings and over what kernels reach.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from foregate.checkpoint.store import Contents
from foregate.config import CardConfig, CpuConfig, PlanConfig
from foregate.errors import ForegateError
from foregate.memory.budget import Budget
from foregate.planner.routing import NAMES, Routing, load_routing
from foregate.schedule import make_scheduler
from foregate.simulate import Machine, run

CHUNKS = 16  # of a record at most: smaller ones take the simulator long and change nothing


@dataclass(frozen=True)
class Figures:
    """A machine: bandwidths in bytes/s, times in seconds, and where the bandwidths come from."""

    memory_bandwidth: float  # of the memory that weights are computed from
    link_bandwidth: float  # of what missing records come over: the disk, or the bus to a device
    link_latency: float
    disk_bandwidth: float  # behind a device: of records that the host's memory has no room for
    disk_latency: float
    reached: float  # share of the memory's bandwidth
    layer_seconds: float  # beside reading weights
    token_seconds: float
    gate_seconds: float
    source: str


@dataclass(frozen=True)
class Speed:
    """Tokens/s of decoding one sequence."""

    low: float
    expected: float
    high: float
    routing: str  # whose routing `expected` assumes


def assumed_figures(device: str) -> Figures:
    """The machine where nothing is known of it."""
    machine = CpuConfig() if device == "cpu" else CardConfig()
    disk = {"disk_bandwidth": CpuConfig.link_bandwidth, "disk_latency": CpuConfig.link_latency}
    return Figures(**asdict(machine), **disk, source="assumed")


def measured_figures(machine: Mapping[str, Any] | str | Path, device: str) -> Figures:
    """From what the doctor found (its `to_json()`), or a file that `foregate doctor --json` wrote.

    What it does not measure is assumed; so is the disk behind a device where that could not be read.

    Raises ForegateError when it is neither, or the device was not measured.
    """
    name = "here" if isinstance(machine, Mapping) else str(machine)
    try:
        found = machine if isinstance(machine, Mapping) else json.loads(Path(machine).read_text())
        measured = found["measured"]
        memory, link = ("memory", "disk") if device == "cpu" else ("device_memory", "device_link")
        known = {
            "memory_bandwidth": float(measured[memory]["bytes_per_second"]),
            "link_bandwidth": float(measured[link]["bytes_per_second"]),
            "link_latency": float(measured[link]["latency_seconds"]),
        }
        if disk := measured.get("disk"):
            known["disk_bandwidth"] = float(disk["bytes_per_second"])
            known["disk_latency"] = float(disk["latency_seconds"])
        return replace(assumed_figures(device), **known, source=f"measured: {name}")
    except OSError as error:
        raise ForegateError(f"--machine {name} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ForegateError(
            f"--machine {name}: there are no measurements for {device}; make them on that machine by foregate doctor --json"
        ) from None


def estimate(budget: Budget, contents: Contents, policy: str, figures: Figures, step_bytes: int) -> Speed:
    """The speed of a budget. step_bytes: what a decode step reads of the backbone and the cache."""
    routings = sorted((load_routing(name) for name in NAMES), key=lambda routing: _unlike(routing, contents))
    speeds = [_simulated(budget, contents, policy, figures, step_bytes, routing) for routing in routings]
    spread = PlanConfig.uncertainty
    return Speed(min(speeds) * (1 - spread), speeds[0], max(speeds) * (1 + spread), routings[0].name)


def _unlike(routing: Routing, contents: Contents) -> float:
    """How differently sparse the traced model is: a factor, at least 1."""
    sparse = max(layer.num_experts for layer in contents.layers) / contents.top_k
    return max(sparse / routing.experts_per_choice, routing.experts_per_choice / sparse)


def _simulated(
    budget: Budget, contents: Contents, policy: str, figures: Figures, step_bytes: int, routing: Routing
) -> float:
    traced, top_k = routing.shape, max(routing.shape.top_k)
    time_scale = len(contents.layers) / len(traced.experts)
    machine = _machine(budget, contents, figures, step_bytes, contents.top_k / top_k, time_scale)
    slots = round(budget.slots / contents.num_experts * sum(traced.experts))
    scheduler = make_scheduler(policy, max(slots, top_k), traced)
    outcome = run(routing.calls, scheduler, machine, PlanConfig.warm_up)
    return outcome.tokens_per_second / time_scale


def _machine(
    budget: Budget, contents: Contents, figures: Figures, step_bytes: int, each: float, time_scale: float
) -> Machine:
    """The machine as a traced model sees it, each of whose experts is `each` real ones and each layer `time_scale`.

    On a device every load takes the mean time: as many of them come from the disk as of all records lie only there.
    """
    layers = len(contents.layers)
    reached = figures.reached * figures.memory_bandwidth
    record = each * sum(n.num_experts * n.layout.nbytes for n in contents.layers) / contents.num_experts
    on_disk = 0.0 if budget.host is None else 1 - budget.host.records / contents.num_experts
    seconds_a_byte = (1 - on_disk) / figures.link_bandwidth + on_disk / figures.disk_bandwidth
    return Machine(
        record_bytes=max(round(record), 1),
        chunk_bytes=max(Machine.chunk_bytes, round(record) // CHUNKS),
        paced=False,
        link_bandwidth=1 / seconds_a_byte,
        link_latency=each * ((1 - on_disk) * figures.link_latency + on_disk * figures.disk_latency),
        layer_seconds=step_bytes / layers / reached + figures.layer_seconds,
        expert_seconds=record / reached,
        token_seconds=figures.token_seconds / time_scale,
        gate_seconds=figures.gate_seconds,
    )
