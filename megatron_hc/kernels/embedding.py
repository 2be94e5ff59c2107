"""Rows of a table whose gradients are added in at least fp32. Dims: V rows of the table, C their width."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_hc.kernels.norm import promote


def embedded(ids: Tensor, weight: Tensor) -> Tensor:
    """ids [...] of rows of weight [V, C] -> [..., C].

    A CPU would round the gradient of a row to bf16 each time that its token comes, which a frequent token's sum does
    not survive: it stops growing at some 256 equal terms. (On CUDA torch adds in fp32 by itself.)
    """
    is_rounded_down = weight.device.type == "cpu" and promote(weight.dtype) != weight.dtype
    return _WideSum.apply(ids, weight) if is_rounded_down else F.embedding(ids, weight)


class _WideSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.num_rows = weight.shape[0]
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        wide = grad.to(promote(grad.dtype))
        return None, torch.ops.aten.embedding_dense_backward(wide, ids, ctx.num_rows, -1, False).to(grad.dtype)
