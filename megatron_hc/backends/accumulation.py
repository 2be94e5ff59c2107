"""--gradient-accumulation-fusion by apex: a weight gradient is added to the fp32 sum by the matrix multiplication.

Without it a micro-batch's gradient is written in bf16, read, and added. Megatron-LM's protocol (``Slot.is_fused``): the
sum is ``weight.main_grad``, and what autograd gets for the weight is memory that nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_hc.model.linear import Linear
from megatron_hc.packages import load

Kernel = Callable[[Tensor, Tensor, Tensor], None]
"""(x [N, in], gradient of the output [N, out], fp32 sum [out, in]): adds its transpose times x to the sum."""


def attach_accumulation(model: nn.Module) -> int:
    """Have the linear layers of ``model`` add their weight gradients to ``main_grad``; returns how many there are."""
    (module,) = load("apex", "--gradient-accumulation-fusion", "fused_weight_gradient_mlp_cuda")
    found = [layer for layer in model.modules() if isinstance(layer, Linear)]
    for layer in found:
        layer.weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
        layer.product = partial(_product, module.wgrad_gemm_accum_fp32)  # type: ignore[method-assign]
    return len(found)


def _product(kernel: Kernel, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not hasattr(weight, "grad_added_to_main_grad"):  # a part of a merged weight: autograd joins their gradients
        return F.linear(x, weight, bias)
    y = _Product.apply(x, weight, kernel)
    return y if bias is None else y + bias


class _Product(torch.autograd.Function):
    """y = x W^T, with W's gradient added to ``W.main_grad``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, kernel: Kernel) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.kernel = weight, kernel  # the object itself: it has the sum
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        grad_x = grads[0] @ weight if ctx.needs_input_grad[0] else None
        ctx.kernel(x.flatten(0, -2).contiguous(), grads[0].flatten(0, -2).contiguous(), weight.main_grad)
        weight.grad_added_to_main_grad = True
        return grad_x, torch.empty_like(weight), None
