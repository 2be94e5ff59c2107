"""Rows taken together where a CPU's caches decide the speed of operations one after another."""

from __future__ import annotations

import torch
from torch import Tensor

CACHED = 1 << 17
"""Numbers of a block for each thread: the few temporary tensors of a block (fp32: 512 KiB each) stay in a core's
caches, and none of the size of a whole activation is made. Smaller blocks cost more in calls than they gain."""


def row_blocks(x: Tensor, numbers: int = CACHED, multiple: int = 1) -> list[slice]:
    """Runs of rows (dim 0) of x that hold at most about ``numbers`` for each thread; off the CPU one with all of them.

    ``multiple``: of this many rows, as far as there are. It lets blocks end where vector instructions do, so that
    functions whose last numbers a CPU computes one by one (exponentials) give the bits of the whole.
    """
    rows = max(1, len(x))
    if x.device.type == "cpu":
        width = max(1, x.numel() // rows)
        rows = multiple * max(1, numbers * torch.get_num_threads() // (multiple * width))
    return [slice(first, min(first + rows, len(x))) for first in range(0, len(x), rows)]
