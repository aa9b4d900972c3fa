"""The examination: everything that is looked at, in the order in which a person wants to read it."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from foregate.checkpoint.store import Store
from foregate.config import DoctorConfig
from foregate.doctor.check import Check
from foregate.doctor.expert import expert_costs
from foregate.doctor.machine import file_system, free_space, lockable_bytes, machine_facts, versions
from foregate.doctor.measure import Bandwidth, disk_bandwidth, link_bandwidth, memory_bandwidth
from foregate.doctor.selftest import TOLERANCE, check_engine, check_kernels
from foregate.errors import ForegateError, first_line
from foregate.kernels import cpu
from foregate.memory.devices import CUDA, SIMULATED, open_device
from foregate.sizes import format_bytes

MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")
NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs")


@dataclass
class Report:
    """What was found. `measured` is what `foregate plan --machine` reads: bytes/s and seconds."""

    machine: dict[str, Any]
    versions: dict[str, str | None]
    folder: Path  # whose file system was looked at
    measured: dict[str, Bandwidth] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        """Whether nothing is broken."""
        return all(check.state != "broken" for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder), "usable": self.usable}


def examine(store: str | Path | None = None) -> Report:
    """Look at everything, in less than 20 seconds. The disk is that of `store`, or of the current folder.

    Raises ForegateError when `store` is named and is none.
    """
    opened = Store(store) if store is not None else None
    folder = (opened.path if opened else Path.cwd()).resolve()
    report = Report(machine_facts(), versions(), folder)
    for look in (_host, _kernels, _memory, _storage, _device, _expert, _self_test):
        report.checks += look(report, opened)
    return report


def _host(report: Report, store: Store | None) -> Iterator[Check]:
    memory = report.machine["memory"]
    limit = memory["cgroup_limit"]
    found = f"{format_bytes(memory['free'])} of {format_bytes(memory['total'])} free for this process"
    found += f", limited to {format_bytes(limit)} by its control group" if limit else ""
    smallest = 1 << 30  # Python, PyTorch and a small model
    yield Check(
        "machine",
        "memory",
        "ok" if memory["free"] >= smallest else "broken",
        found,
        "" if memory["free"] >= smallest else "free memory or raise the limit: PyTorch alone takes half a GiB",
    )
    cores, usable = report.machine["cores"], report.machine["usable_cores"]
    yield Check("machine", "processor", "ok", f"{report.machine['processor']}, {usable} of {cores} cores usable")
    for card in report.machine["cards"]:
        found = f"{card['name']}, {format_bytes(card['free'])} of {format_bytes(card['memory'])} free"
        yield Check("machine", "card", "ok", f"{found}, compute capability {card['capability']}")


def _kernels(report: Report, store: Store | None) -> Iterator[Check]:
    try:
        reason = cpu.why_not()
    except ForegateError as error:  # FOREGATE_ISA names what is not here
        yield Check("kernels", "cpu", "broken", str(error), "unset FOREGATE_ISA")
        return
    if reason:
        mend = "install a C++ compiler and reinstall Foregate; until then it runs on PyTorch alone"
        yield Check("kernels", "cpu", "slow", reason, mend)
    else:
        others = [isa for isa in cpu.isas() if isa != cpu.isa()]
        beside = f"; {', '.join(others)} work too" if others else ""
        yield Check("kernels", "cpu", "ok", f"native, {cpu.isa()}, {cpu.threads()} threads{beside}")
    yield _triton(report)


def _triton(report: Report) -> Check:
    if not report.machine["cards"]:
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "there is no CUDA card here"
        return Check("kernels", "triton", "ok", f"not used: {why}")
    try:
        from foregate.kernels.triton import why_not
    except ImportError as error:
        return Check("kernels", "triton", "slow", str(error), "pip install triton")
    reason = why_not(torch.device("cuda"))
    return Check(
        "kernels", "triton", "slow" if reason else "ok", reason or "on the card", "use another card" if reason else ""
    )


def _memory(report: Report, store: Store | None) -> Iterator[Check]:
    found = report.measured["memory"] = memory_bandwidth()
    yield Check("speed", "memory", "ok", f"{found.bytes_per_second / 1e9:.1f} GB/s read, {found.note}")


def _storage(report: Report, store: Store | None) -> Iterator[Check]:
    kind, point = file_system(report.folder)
    network = kind in NETWORK_FILE_SYSTEMS
    mend = "records come over the network: copy the store to a local disk" if network else ""
    yield Check("storage", "file system", "slow" if network else "ok", f"{kind} at {point}", mend)
    free = free_space(report.folder)
    little = free < DoctorConfig.little_space and store is None
    yield Check(
        "storage",
        "space",
        "slow" if little else "ok",
        f"{format_bytes(free)} free",
        "a conversion may not fit here: name another place for it" if little else "",
    )
    try:
        found = disk_bandwidth(report.folder, store.experts_path if store else None)
    except OSError as error:
        mend = "name a store whose disk can be read, or run it in a folder that can be written"
        yield Check("storage", "reads", "slow", f"not measured: {error.strerror}", mend)
        return
    report.measured["disk"] = found
    yield _direct(found, kind)
    slow = found.bytes_per_second < DoctorConfig.slow_disk
    yield Check(
        "speed",
        "disk",
        "slow" if slow else "ok",
        f"{found.bytes_per_second / 1e9:.2f} GB/s, {found.latency_seconds * 1e6:.0f} us a page",
        "the disk will bound every run: use a faster one, fewer bits or more memory" if slow else "",
    )


def _direct(found: Bandwidth, kind: str) -> Check:
    if found.note == "direct reads":
        return Check("storage", "direct I/O", "ok", "works")
    if kind in MEMORY_FILE_SYSTEMS:
        return Check("storage", "direct I/O", "slow", f"none: {kind} is memory", "put the store on a disk")
    return Check(
        "storage",
        "direct I/O",
        "slow",
        "refused: reads go through the page cache",
        "put the store on ext4, xfs or btrfs",
    )


def _device(report: Report, store: Store | None) -> Iterator[Check]:
    limit = lockable_bytes()
    little = bool(report.machine["cards"]) and limit is not None and limit < DoctorConfig.little_locked
    yield Check(
        "limits",
        "pinned memory",
        "slow" if little else "ok",
        "no limit" if limit is None else f"{format_bytes(limit)} may be locked",
        "raise it with ulimit -l unlimited, so that records can be copied to the card directly" if little else "",
    )
    if not report.machine["cards"]:
        return
    try:
        link, own = link_bandwidth()
    except RuntimeError as error:
        yield Check(
            "speed", "card", "broken", first_line(error), "free the card's memory, or check the driver with nvidia-smi"
        )
        return
    report.measured["device_link"], report.measured["device_memory"] = link, own
    found = f"{link.bytes_per_second / 1e9:.1f} GB/s from pinned memory, {link.latency_seconds * 1e6:.0f} us a page"
    yield Check("speed", "link", "ok", found)
    yield Check("speed", "card's memory", "ok", f"{own.bytes_per_second / 1e9:.0f} GB/s")


def _expert(report: Report, store: Store | None) -> Iterator[Check]:
    """What placement compares; without a card, what compute and the disk take."""
    if store is None:
        return
    card = bool(report.machine["cards"])
    try:
        costs = expert_costs(store, open_device(CUDA if card else SIMULATED, None, 0.0))
    except (ForegateError, RuntimeError) as error:
        yield Check("speed", "an expert", "broken", first_line(error), "check the store with foregate verify")
        return
    found = f"{costs.host * 1e3:.2f} ms on this processor"
    if card:
        found = f"{costs.load * 1e3:.2f} ms over the link, {costs.device * 1e3:.2f} ms on the card, {found}"
    elif (disk := report.measured.get("disk")) is not None:
        found = f"{found}, {store.record_bytes / disk.bytes_per_second * 1e3:.2f} ms from the disk"
    yield Check("speed", "an expert", "ok", found)


def _self_test(report: Report, store: Store | None) -> Iterator[Check]:
    if any(check.name == "cpu" and check.state == "ok" for check in report.checks):
        wrong = check_kernels()
        mend = "set FOREGATE_ISA to one that is not listed, or use --kernel reference, and report it" if wrong else ""
        found = "; ".join(wrong) or f"{', '.join(cpu.isas())} compute what PyTorch does"
        yield Check("self-test", "kernels", "broken" if wrong else "ok", found, mend)
    yield _engine(check_engine)


def _engine(check: Callable[[], float]) -> Check:
    try:
        error = check()
    except Exception as failure:  # whatever it is, this is what the doctor is for
        return Check("self-test", "engine", "broken", first_line(failure), "run make test and report what fails")
    good = error <= TOLERANCE
    found = f"a tiny model, half of its experts in memory: logits differ by {error:.0e}"
    return Check("self-test", "engine", "ok" if good else "broken", found, "" if good else "report it")
