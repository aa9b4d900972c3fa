"""Memory for weights: aligned, on huge pages, never more resident than asked for."""

import mmap
import re
from pathlib import Path

import pytest
import torch

from foregate.memory.pages import HUGE_PAGE, allocate

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def mapping(address: int) -> dict[str, int]:
    """Bytes of the fields of the mapping that holds `address`, from the kernel."""
    for entry in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)[1:]:
        first, last = (int(end, 16) for end in entry.split(maxsplit=1)[0].split("-"))
        if first <= address < last:
            return {name: int(size) * 1024 for name, size in re.findall(r"^(\w+): +(\d+) kB", entry, re.MULTILINE)}
    raise AssertionError("no such mapping")


@pytest.mark.parametrize("nbytes", [1, 4096, HUGE_PAGE - 1, HUGE_PAGE, 3 * HUGE_PAGE + 5])
def test_zeros_of_the_size_asked_for_that_can_be_written(nbytes: int) -> None:
    view = allocate(nbytes)
    tensor = torch.frombuffer(view, dtype=torch.uint8)
    assert len(view) == nbytes and tensor.data_ptr() % mmap.PAGESIZE == 0
    assert not tensor.any()
    view[-1] = 7
    assert tensor[-1] == 7


@pytest.mark.skipif(not SWITCH.exists() or "[never]" in SWITCH.read_text(), reason="no huge pages here")
def test_whole_huge_pages_are_used() -> None:
    tensor = torch.frombuffer(allocate(8 * HUGE_PAGE), dtype=torch.uint8)
    before = mapping(tensor.data_ptr())["AnonHugePages"]
    tensor.fill_(1)
    assert mapping(tensor.data_ptr())["AnonHugePages"] - before >= 6 * HUGE_PAGE  # the system may lack a whole one


@pytest.mark.skipif(not SWITCH.exists(), reason="no huge pages here")
def test_the_rest_of_the_last_huge_page_stays_untouched() -> None:
    tensor = torch.frombuffer(allocate(HUGE_PAGE + 4096), dtype=torch.uint8)
    before = mapping(tensor.data_ptr() + HUGE_PAGE)["Rss"]  # the system may have joined it with a neighbour
    tensor[-1] = 1
    assert mapping(tensor.data_ptr() + HUGE_PAGE)["Rss"] - before <= 64 * 1024  # the page, perhaps a few around it
