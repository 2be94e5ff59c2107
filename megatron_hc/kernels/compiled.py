"""What code under torch.compile (``--compile``) takes in the place of eager code's."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_hc.kernels.swiglu import swiglu, swiglu_reference


def own(x: Tensor) -> Tensor:
    """``x`` as a result of an autograd Function's ``forward``.

    torch 2.11's compiler makes wrong gradients, silently, if an operation of ``forward`` has handed out the result
    before: a tensor changed in place, or one that ``to`` or ``contiguous`` returned as it was
    (github.com/pytorch/pytorch/issues/180642). A view is a tensor of its own.
    """
    return x.view_as(x) if torch.compiler.is_compiling() else x


def is_compiled_without_gradients() -> bool:
    """Whether an autograd Function of any number of tensors is to be left out, here where it would keep nothing.

    Without gradients torch 2.13's compiler runs ``forward`` itself, and leaves out ``ctx`` where there are as many
    arguments as parameters: ``forward(ctx, x, *states)`` with two states. Its graph then ends there.
    """
    return torch.compiler.is_compiling() and not torch.is_grad_enabled()


def gated(h: Tensor) -> Tensor:
    """``swiglu``; under a compiler its formula, which joins what is around it."""
    return swiglu_reference(h) if torch.compiler.is_compiling() else swiglu(h)


def turned(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """``apply_rope``'s formula, for a compiler."""
    cos, sin = table
    rotated = cos.shape[-1]
    wide = x[..., :rotated].to(cos.dtype)
    first, second = wide.chunk(2, dim=-1)
    y = (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
    return y if rotated == x.shape[-1] else torch.cat((y, x[..., rotated:]), dim=-1)
