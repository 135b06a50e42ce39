"""The C allocator's memory between two training steps."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Make freed memory serve the next allocation instead of going back to the system.

    A step on the CPU allocates the same large tensors as the step before. By default glibc unmaps
    each when it is freed, and the next step's first touch of every page is a fault: 5 to 7% of a
    step of 32 images (width 384, depth 6, bf16, 2 cores; `tests.benchmarks.train_step` with and
    without it). The process keeps its peak size. Does nothing where the C library has no `mallopt`
    (macOS, musl).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)  # never
    mallopt(_M_ARENA_MAX, 1)  # an arena of gloo's threads would unmap what they allocate
