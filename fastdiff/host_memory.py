"""Memory of the CPU that is freed and asked for again in every step: kept instead of returned to the system."""

from __future__ import annotations

import ctypes
import functools
import os

# of <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MIB = 2**20


@functools.cache
def keep_host_memory() -> bool:
    """Have this process keep up to 2 GiB of freed memory for its next allocations; returns whether it does from now on.

    glibc returns large blocks to the system as soon as they are free, and the system hands out zeroed pages again, one
    page fault each: that can take longer than the arithmetic on the block. A training step, or a sampling step, asks
    for the same blocks as the one before. The setting holds for the whole process (mallopt(3)); blocks of a GiB and
    more still go back. FASTDIFF_KEEP_HOST_MEMORY=0 in the environment leaves malloc as it is; so do systems without
    glibc, and malloc's replacements, which have such caches of their own.
    """
    if os.environ.get("FASTDIFF_KEEP_HOST_MEMORY") == "0":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    # older versions of glibc take no more than half a heap of a thread
    mapped = any(mallopt(M_MMAP_THRESHOLD, size) for size in (1024 * MIB, 32 * MIB))
    return bool(mapped and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
