"""Rotary position embeddings (arXiv 2104.09864), half-rotation layout. Dims: S sequence, B batch, H head width."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_hc.config import ModelConfig
from megatron_hc.kernels.choice import replaces_torch
from megatron_hc.kernels.norm import promote
from megatron_hc.kernels.row_blocks import row_blocks


class RopeTable(NamedTuple):
    """cos and sin of every position, each [S, B or 1, 1, rotated channels]."""

    cos: Tensor
    sin: Tensor


def inverse_frequencies(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rotated / 2] angular frequencies; with --use-rope-scaling Llama 3's (low 1, high 4, original length 8192)."""
    rotated = int(config.head_size * config.rotary_percent)
    steps = torch.arange(0, rotated, 2, dtype=dtype, device=device) / rotated
    frequencies = 1.0 / (config.rotary_base**steps)
    if not config.use_rope_scaling:
        return frequencies
    low, high, original = 1.0, 4.0, 8192
    wavelengths = 2 * math.pi / frequencies
    slow = frequencies / config.rope_scaling_factor
    smooth = (original / wavelengths - low) / (high - low)
    blended = (1 - smooth) * slow + smooth * frequencies
    scaled = torch.where(wavelengths > original / low, slow, frequencies)
    is_medium = (wavelengths <= original / low) & (wavelengths >= original / high)
    return torch.where(is_medium, blended, scaled)


def rope_table(position_ids: Tensor, config: ModelConfig, dtype: torch.dtype) -> RopeTable:
    """Tables for ``position_ids`` [B or 1, S], in at least fp32."""
    frequencies = inverse_frequencies(config, promote(dtype), position_ids.device)
    angles = position_ids.t().to(frequencies.dtype)[..., None, None] * frequencies  # [S, B, 1, rotated / 2]
    angles = torch.cat((angles, angles), dim=-1)
    return RopeTable(angles.cos(), angles.sin())


def apply_rope(x: Tensor, table: RopeTable, backend: str = "auto") -> Tensor:
    """Rotate the leading channels of x [S, B, heads, H]; computed in the table's dtype, result in x's.

    ``backend``: auto (Triton on CUDA, torch elsewhere and under torch.compile), torch or triton.
    """
    rotated = table.cos.shape[-1]
    if replaces_torch(x, backend):
        return _Turn.apply(x, table.cos, table.sin, True)
    turned = _Turn.apply(x[..., :rotated], table.cos, table.sin, False)
    return turned if rotated == x.shape[-1] else torch.cat((turned, x[..., rotated:]), dim=-1)


class _Turn(torch.autograd.Function):
    """(a, b) -> (a cos - b sin, b cos + a sin) of both halves of the channels; its gradient is the turn back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, in_triton: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.in_triton = in_triton
        return _turn(x, cos, sin, 1, in_triton)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1, ctx.in_triton), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int, in_triton: bool) -> Tensor:
    if not in_triton:
        return _turned(x, cos, sin, direction)
    from megatron_hc.kernels import rope_triton

    return rope_triton.turned(x, cos, sin, direction)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """A pass for the exchanged halves, then whole rows in place: short rows are slow on a CPU."""
    left, right = sin.chunk(2, dim=-1)
    signed = torch.cat((-left, right) if direction > 0 else (left, -right), dim=-1)
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.device.type == "cpu":  # as attention reads it there
        S, B, heads, H = x.shape
        result = result.view(B, heads, S, H).permute(2, 0, 1, 3)
    for rows in row_blocks(x):
        wide = x[rows].to(cos.dtype)
        first, second = wide.chunk(2, dim=-1)
        result[rows] = torch.cat((second, first), dim=-1).mul_(signed[rows]).add_(wide * cos[rows])
    return result
