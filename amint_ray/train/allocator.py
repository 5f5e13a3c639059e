"""Memory that a step frees is memory that the next step wants."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # glibc's malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for this process instead of returning it to the system.

    By default a tensor of some megabytes is mapped anew, page by page, whenever it is needed again:
    a CPU step on twice the rows then takes more than twice as long. The process keeps its peak of
    memory, as CUDA's caching allocator does.

    Returns:
        Whether there was a glibc to tell.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(
        mallopt(_TRIM_THRESHOLD, _LARGEST) and mallopt(_MMAP_MAX, 0)
    )
