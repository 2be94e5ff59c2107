"""Where kernels are Triton's. It comes with torch for CUDA, and is imported by what uses it alone."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed: looking for it takes longer than a small kernel."""
    return importlib.util.find_spec("triton") is not None


def runs_in_triton(tensor: Tensor, backend: str = "auto") -> bool:
    """Whether kernels are Triton's where there are such: on CUDA, or where asked for (its interpreter).

    ``backend``: auto, triton, or another's name. float64, the dtype of comparisons, is computed in torch.
    """
    if backend not in ("auto", "triton") or tensor.dtype == torch.float64:
        return False
    return (backend == "triton" or tensor.is_cuda) and has_triton()


def replaces_torch(tensor: Tensor, backend: str = "auto") -> bool:
    """The same for what a compiler joins with its neighbours by itself: under torch.compile it stays torch."""
    return not torch.compiler.is_compiling() and runs_in_triton(tensor, backend)
