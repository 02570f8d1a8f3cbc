"""Memory that a training step frees is kept for the next one, instead of going back to the operating system.

glibc returns large freed blocks at once, and the next step faults every page of them in again: on a virtual machine a
sixth of a step (docs/decisions.md). The peak grows little, because the next step would have asked for the same.
"""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
MIB = 2**20


def keep_freed_memory() -> None:
    """Sets malloc's thresholds for this process. Does nothing where there is no glibc."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return
    mallopt(M_MMAP_THRESHOLD, 32 * MIB)  # the largest glibc takes: blocks below it come from the heap
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # free memory at its end that the heap keeps
    mallopt(M_TOP_PAD, 64 * MIB)  # and grows by
