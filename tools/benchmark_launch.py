"""Launch options of a boundary's Triton kernels beside the chosen ones, for tools/benchmark.py --parts launch.

What is best depends on the GPU: warps of a token, and how many columns a thread has at a time. The figures say whether
the choice in ``kernels/boundary_triton.py`` is right for the one at hand; nothing is changed by them.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from benchmark_kernels import KERNELS, kernel
from benchmark_report import Report

WARPS = (1, 2, 4, 8, 16)
COLUMNS = (1, 2, 4, 8)
CHOOSERS = ("forward_options", "read_options", "streams_options", "row_options")
"""Functions of ``boundary_triton``: of the forward pass, the sums in a backward pass, its streams, and mHC's rows."""


def launch(shape: argparse.Namespace, dtype: torch.dtype, report: Report) -> None:
    """n = 4: the chosen options, then one kind of them at a time."""
    if shape.device != "cuda" and shape.backend != "triton":
        raise SystemExit("benchmark.py: error: --parts launch needs --device cuda, or --backend triton (interpreted)")
    from megatron_hc.kernels import boundary_triton

    for method in KERNELS:
        measure = functools.partial(kernel, method, 4, shape.hidden, shape.seq * shape.batch, dtype, shape)
        for name, options in candidates(boundary_triton, method):
            print(f"{name:38s}", end="", flush=True)
            with replaced(boundary_triton, options):
                row = report.attempt(f"{method} {name}", measure)
            if row is not None:
                report.add("launch", {"options": name, **row})


def candidates(module: Any, method: str) -> Iterator[tuple[str, dict[str, Callable[..., Any]]]]:
    """(name, functions of ``boundary_triton`` that choose); mHC's forward pass has kernels of its own, row by row."""
    yield "as chosen", {}
    for chooser in CHOOSERS:
        if chooser == ("forward_options" if method == "mhc" else "row_options"):
            continue
        kernel = chooser.removesuffix("_options")
        if chooser != "row_options":
            for columns in COLUMNS:
                yield f"{kernel}: {columns} columns", {chooser: changed(getattr(module, chooser), {"V": columns})}
        if chooser != "streams_options":
            for warps in WARPS:
                yield f"{kernel}: {warps} warps", {chooser: changed(getattr(module, chooser), {"num_warps": warps})}


def changed(choose: Callable[..., dict[str, Any]], options: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """What ``choose`` chooses, but for ``options``."""

    def chosen(*arguments: Any) -> dict[str, Any]:
        found = {**choose(*arguments), **options}
        return {**found, "E": 32 * found["num_warps"] * found["V"]} if "V" in found else found

    return chosen


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
