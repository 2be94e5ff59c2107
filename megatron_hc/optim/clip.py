"""The local parts of gradient clipping. Sums over ranks are the caller's, who knows which rank holds what."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CPU_ROW = 1 << 14
"""Squares that a CPU adds in one go."""


@torch.no_grad()
def grad_norm_squared(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all elements, a scalar in fp32 (float64 if a tensor is float64). Also of parameters.

    A CPU adds a whole tensor in a few fp32 sums, one for each lane of a vector: of 40 million numbers 0.5 % got lost.
    So it gets them in rows, whose sums are added in pairs.
    """
    if not tensors:
        return torch.zeros(())
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    norms: list[Tensor] = []
    parts: list[Tensor] = []
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.numel() > CPU_ROW:
            numbers = tensor.flatten()
            end = numbers.numel() // CPU_ROW * CPU_ROW
            # Rows of one tensor, not tensors: a CPU's threads share them out.
            norms.append(torch.linalg.vector_norm(numbers[:end].view(-1, CPU_ROW), dim=1, dtype=dtype))
            tensor = numbers[end:]
        parts.append(tensor)
    norms.append(torch.stack(torch._foreach_norm(parts, 2, dtype=dtype)))
    return torch.cat(norms).square().sum()


@torch.no_grad()
def num_zeros(tensors: Sequence[Tensor]) -> int:
    """Number of elements that are exactly zero."""
    return sum(tensor.numel() - int(torch.count_nonzero(tensor)) for tensor in tensors)


def clip_coefficient(norm: float, max_norm: float) -> float:
    """What gradients are multiplied with so that their norm is at most ``max_norm`` (0: never clip); Megatron-LM's.

    A norm that is not finite gives that norm's own arithmetic (nan stays nan), so that nothing hides it.
    """
    if max_norm == 0.0:
        return 1.0
    coefficient = max_norm / (norm + 1e-6)
    return 1.0 if coefficient > 1.0 else coefficient
