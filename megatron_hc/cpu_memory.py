"""How the C library of a process that trains on a CPU treats memory that is freed. Loads no torch."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
NEVER = -1
KEPT_BELOW = (1 << 30, 1 << 25)
"""Bytes of a block; the second for glibc before 2.35, which takes no more than 32 MiB."""
OF_THE_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Let glibc keep what is freed, for the next step, instead of giving it back to the kernel; -> whether it does.

    Activations are of the same sizes in every step. glibc returns them at each step's end, and the kernel then clears
    and maps every page anew: 40 thousand page faults and a tenth of a second per step of docs/benchmarks.md's small
    model with hyper-connections. Only for blocks below 1 GiB. Nothing is done where the user has set glibc's own
    variables for it, or where the C library has no such settings (musl, macOS).
    """
    if any(environment.get(name) for name in OF_THE_USER):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        return False
    # Either setting alone would end glibc's own adaptation and leave the other at its small start.
    return any(mallopt(M_MMAP_THRESHOLD, size) for size in KEPT_BELOW) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
