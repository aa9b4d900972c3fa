"""The doctor: what it finds on a machine that works, and on one that does not."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch

from foregate.config import DoctorConfig
from foregate.doctor import examine, machine, measure, report, selftest
from foregate.doctor.check import Check
from foregate.errors import ForegateError
from foregate.kernels import cpu
from foregate.planner.speed import measured_figures


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short measurements: their values are not what is tested."""
    for name, value in (
        ("memory_bytes", 16 << 20),
        ("memory_seconds", 0.05),
        ("disk_seconds", 0.3),
        ("scratch_bytes", 16 << 20),
    ):
        monkeypatch.setattr(DoctorConfig, name, value)


def found(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


def test_a_machine_that_works(demo_store: Path, tmp_path: Path) -> None:
    done = examine(demo_store)
    assert done.usable, done.checks
    assert {check.topic for check in done.checks} == {"machine", "kernels", "speed", "storage", "limits", "self-test"}
    assert all(check.mend for check in done.checks if check.state != "ok")
    assert done.folder == demo_store.resolve()
    assert " ms on this processor" in found(done.checks, "an expert").found
    file = tmp_path / "machine.json"
    file.write_text(json.dumps(done.to_json()))
    figures = measured_figures(file, "cpu")
    assert figures.memory_bandwidth == done.measured["memory"].bytes_per_second > 1e8
    assert figures.link_bandwidth == done.measured["disk"].bytes_per_second > 1e6
    assert 0 < figures.link_latency < 1
    if not torch.cuda.is_available():
        with pytest.raises(ForegateError, match="no measurements for cuda"):
            measured_figures(file, "cuda")


def test_nothing_is_left_where_there_is_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bandwidth = measure.disk_bandwidth(tmp_path)
    assert bandwidth.bytes_per_second > 0
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_and_left_clean(small_disk: Path) -> None:
    done = report.Report({}, {}, small_disk)
    checks = list(report._storage(done, None))
    assert found(checks, "file system").found == f"tmpfs at {small_disk}"
    assert found(checks, "space").state == "slow"
    assert found(checks, "reads").found == "not measured: No space left on device"
    assert list(small_disk.iterdir()) == []


def test_an_instruction_set_that_is_not_here_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise ForegateError("FOREGATE_ISA=sse: not here")

    monkeypatch.setattr(cpu, "why_not", fail)
    [check] = report._kernels(report.Report({"cards": []}, {}, Path()), None)
    assert (check.state, check.mend) == ("broken", "unset FOREGATE_ISA")


def test_without_native_kernels_it_is_slow_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "why_not", lambda: "the library was not built")
    check, triton = report._kernels(report.Report({"cards": []}, {}, Path()), None)
    assert (check.state, check.found) == ("slow", "the library was not built")
    assert "compiler" in check.mend
    assert triton.found.startswith("not used")


def test_kernels_that_compute_wrongly_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpu.available():
        pytest.skip("no native kernels here")
    assert selftest.check_kernels() == []
    right, used = cpu.matmul, cpu.isa()
    monkeypatch.setattr(cpu, "matmul", lambda x, matrix, exact: right(x, matrix, exact=exact) * 1.01)
    wrong = selftest.check_kernels()
    assert len(wrong) == 4 * len(cpu.isas())
    assert "2 bits: relative error 1.0e-02" in "\n".join(wrong)
    assert cpu.isa() == used


def test_an_engine_that_fails_is_broken_and_does_not_stop_the_doctor() -> None:
    def fail() -> float:
        raise OSError("no disk\nat all")

    check = report._engine(fail)
    assert (check.state, check.found) == ("broken", "no disk")
    assert report._engine(lambda: float("nan")).state == "broken"
    assert report._engine(lambda: 1e-7).state == "ok"


def test_a_small_limit_on_pinned_memory_matters_where_there_is_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (8 << 20, 8 << 20))
    assert machine.lockable_bytes() == 8 << 20
    without = next(report._device(report.Report({"cards": []}, {}, Path()), None))
    beside_card = next(report._device(report.Report({"cards": [{}]}, {}, Path()), None))
    assert (without.state, beside_card.state) == ("ok", "slow")
    assert "ulimit -l unlimited" in beside_card.mend
