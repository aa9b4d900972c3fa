"""The machine and what is installed on it."""

import importlib.metadata
import os
import platform
import resource
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from foregate import __version__
from foregate.kernels import cpu
from foregate.memory.limits import host_memory

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "triton")


def machine_facts() -> dict[str, Any]:
    """Processor, memory and cards. Sizes in bytes."""
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "instruction_sets": cpu.isas() if cpu.available() else [],
        "memory": asdict(host_memory()),
        "cards": [_card(index) for index in range(torch.cuda.device_count())],
    }


def versions() -> dict[str, str | None]:
    """Of Python, Foregate and what it stands on; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "foregate": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def file_system(folder: Path) -> tuple[str, str]:
    """(type, mount point) of the file system that holds a folder; ("unknown", "/") where the kernel does not say."""
    try:
        lines = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown", "/"
    holding = [(fields[1], fields[2]) for fields in lines if folder.is_relative_to(fields[1])]
    point, kind = max(holding, key=lambda mount: len(mount[0]), default=("/", "unknown"))
    return kind, point


def free_space(folder: Path) -> int:
    """Bytes free on the file system that holds a folder."""
    return shutil.disk_usage(folder).free


def lockable_bytes() -> int | None:
    """How much memory this process may pin; None without a limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY or os.geteuid() == 0 else soft


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _card(index: int) -> dict[str, Any]:
    facts = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return {"name": facts.name, "capability": f"{facts.major}.{facts.minor}", "memory": total, "free": free}
