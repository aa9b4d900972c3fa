"""How much memory there is: by the machine, and by control groups of both versions."""

from pathlib import Path

import pytest

from foregate.memory import limits
from foregate.memory.process import resident_bytes

GIB = 2**30


def test_this_machine() -> None:
    found = limits.host_memory()
    assert resident_bytes() < found.free <= found.total


@pytest.mark.parametrize(
    ("names", "cache"),
    [
        (("memory.max", "memory.current"), "inactive_file"),
        (("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file"),
    ],
)
def test_the_tightest_group_counts_and_the_page_cache_does_not(
    names: tuple[str, str], cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, outer = tmp_path / "a/b", tmp_path / "a"
    inner.mkdir(parents=True)
    for folder, limit in ((inner, 8 * GIB), (outer, 4 * GIB)):
        (folder / names[0]).write_text(str(limit))
        (folder / names[1]).write_text(str(3 * GIB))
        (folder / "memory.stat").write_text(f"{cache} {GIB}\nother 5\n")
    (tmp_path / names[0]).write_text("max" if names[0] == "memory.max" else str(2**63 - 4096))
    (tmp_path / names[1]).write_text("1")
    monkeypatch.setattr(limits, "_cgroup_folders", lambda: [(folder, names) for folder in (inner, outer, tmp_path)])
    assert limits._cgroup() == (4 * GIB, 2 * GIB)
    free = limits.host_memory().free
    assert free <= 2 * GIB + resident_bytes() + 2**20
    assert limits.host_memory().cgroup_limit == 4 * GIB
