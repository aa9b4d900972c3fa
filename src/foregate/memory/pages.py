"""Memory for weights, on huge pages where the system has them.

Kernels read weights in long runs; on small pages a third of their time goes into looking up addresses.
"""

import contextlib
import mmap

import torch

HUGE_PAGE = 2 << 20  # of x86-64, and of arm64 with pages of 4 KiB


def allocate(nbytes: int) -> memoryview:
    """Zeros, uint8 [nbytes], page-aligned. No page is resident before it is first touched, none beyond `nbytes` ever."""
    block = mmap.mmap(-1, nbytes + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has small pages
    start = -torch.frombuffer(block, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    whole_pages = nbytes // HUGE_PAGE * HUGE_PAGE
    if whole_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages: the memory is as good, only slower
            block.madvise(mmap.MADV_HUGEPAGE, start, whole_pages)
    return memoryview(block)[start : start + nbytes]
