"""Launch options of a boundary's Triton kernels beside the chosen ones, for tools/benchmark.py --parts launch.

What is best depends on the GPU: threads per token of the kernels that have a token per program, columns per thread and
programs per multiprocessor of the kernel that has columns. The figures say whether the choice in
``kernels/boundary_triton.py`` is right for the one at hand; nothing is changed by them.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from benchmark_kernels import KERNELS, kernel
from benchmark_report import Report

WARPS = (1, 2, 4, 8, 16)
COLUMNS = (1, 2, 4, 8)
PROGRAMS = (4, 8, 12, 16, 24)


def launch(shape: argparse.Namespace, dtype: torch.dtype, report: Report) -> None:
    """n = 4: the chosen options, then one kind of them at a time."""
    if shape.device != "cuda" and shape.backend != "triton":
        raise SystemExit("benchmark.py: error: --parts launch needs --device cuda, or --backend triton (interpreted)")
    from megatron_hc.kernels import boundary_triton

    for method in KERNELS:
        measure = functools.partial(kernel, method, 4, shape.hidden, shape.seq * shape.batch, dtype, shape)
        for name, options in candidates():
            print(f"{name:38s}", end="", flush=True)
            with replaced(boundary_triton, options):
                row = report.attempt(f"{method} {name}", measure)
            if row is not None:
                report.add("launch", {"options": name, **row})


def candidates() -> Iterator[tuple[str, dict[str, Callable[..., Any]]]]:
    """(name, functions of ``boundary_triton`` that choose)."""
    yield "as chosen", {}
    for warps in WARPS:
        yield f"rows: {warps} warps", {"row_options": lambda constants, warps=warps: {"num_warps": warps}}
    for columns, programs in itertools.product(COLUMNS, PROGRAMS):
        found = {"E": 32 * columns, "V": columns, "num_warps": 1}, programs
        name = f"streams: {columns} columns, {programs} programs"
        yield name, {"streams_options": lambda form, constants, found=found: found}


@contextmanager
def replaced(module: Any, functions: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """``module`` with ``functions`` in the place of its own."""
    before = {name: getattr(module, name) for name in functions}
    for name, function in functions.items():
        setattr(module, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)
