"""Losses made inside the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def attach_loss(x: Tensor, loss: Tensor, share: float = 1.0) -> Tensor:
    """Hand on ``x``; in the backward pass the loss gets the gradient ``share``.

    So a loss made inside the model joins the step's loss without being passed to its end, which may be on another
    pipeline stage.
    """
    return _Attach.apply(x, loss, share)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, share: float) -> Tensor:
        ctx.share, ctx.like = share, (loss.dtype, loss.device)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        dtype, device = ctx.like
        return grads[0], torch.full((), ctx.share, dtype=dtype, device=device), None
