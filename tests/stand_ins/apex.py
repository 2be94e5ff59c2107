"""apex's functions as their sources declare them (github.com/NVIDIA/apex), and the kernels below them, in torch.

transformer-engine's ``optimizers`` has the same Adam (its ``optimizers/fused_adam.py`` calls it so).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2048 * 32


class MultiTensorApply:
    """apex/multi_tensor_apply/multi_tensor_apply.py"""

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size

    def __call__(self, op: Any, noop_flag_buffer: Tensor, tensor_lists: list[list[Tensor]], *args: Any) -> Any:
        return op(self.chunk_size, noop_flag_buffer, tensor_lists, *args)


@torch.no_grad()
def multi_tensor_adam(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Sequence[Sequence[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """csrc/multi_tensor_adam.cu with mode 1 (decoupled decay): lists of gradients, weights, first, second moments."""
    assert mode == 1 and bias_correction == 1 and chunk_size == CHUNK
    assert noop_flag.dtype == torch.int and noop_flag.item() == 0
    gradients, weights, firsts, seconds = tensor_lists
    for g, p, m, v in zip(gradients, weights, firsts, seconds, strict=True):
        assert all(t.is_contiguous() and t.shape == p.shape and t.dtype == p.dtype for t in (g, p, m, v))
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g * g)
        first, second = m / (1 - beta1**step), v / (1 - beta2**step)
        p.sub_(lr * (first / (second.sqrt() + epsilon) + weight_decay * p))


ADAM = {"multi_tensor_applier": MultiTensorApply(CHUNK), "multi_tensor_adam": multi_tensor_adam}


def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    assert input.dtype == weight.dtype == bias.dtype, "input and weights of one dtype"
    return F.layer_norm(input, tuple(normalized_shape), weight, bias, eps)


def mixed_dtype_fused_layer_norm_affine(
    input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False
):
    return F.layer_norm(input.to(weight.dtype), tuple(normalized_shape), weight, bias, eps)


def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    assert input.dtype == weight.dtype, "input and weights of one dtype"
    return F.rms_norm(input, tuple(normalized_shape), weight, eps)


def mixed_dtype_fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    return F.rms_norm(input.to(weight.dtype), tuple(normalized_shape), weight, eps)


NORMS = {
    function.__name__: function
    for function in (
        fused_layer_norm_affine,
        mixed_dtype_fused_layer_norm_affine,
        fused_rms_norm_affine,
        mixed_dtype_fused_rms_norm_affine,
    )
}


@torch.no_grad()
def wgrad_gemm_accum_fp32(input: Tensor, d_output: Tensor, d_weight: Tensor) -> None:
    """csrc/megatron/fused_weight_gradient_dense.cpp: ``d_weight`` [out, in] += d_output^T [out, N] input [N, in]."""
    assert d_weight.dtype == torch.float32 and input.dtype == d_output.dtype and input.dim() == d_output.dim() == 2
    assert input.is_contiguous() and d_output.is_contiguous()
    d_weight.addmm_(d_output.t().float(), input.float())
