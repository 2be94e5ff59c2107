"""Norms in at least fp32. Dims: D the normed width; any leading dims."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_hc.kernels.choice import replaces_torch
from megatron_hc.kernels.row_blocks import row_blocks

WIDEST_IN_TRITON = 1 << 13  # a wider row does not fit into the registers of the backward pass


class NormParts(NamedTuple):
    """A norm as numbers, for an operation that does it with something else."""

    kind: str
    """RMSNorm or LayerNorm."""
    weight: Tensor
    bias: Tensor | None
    eps: float


def promote(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which mixing weights, norms and losses are computed: at least fp32, float64 stays float64."""
    return torch.promote_types(dtype, torch.float32)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, without its few microseconds where there is nothing to do: several times a sublayer."""
    return x if x.dtype == dtype else x.to(dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, backend: str = "auto") -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim; result in x's dtype (Zhang & Sennrich, 2019).

    ``backend``, here and below: auto (Triton on CUDA, torch elsewhere and under torch.compile), torch or triton.
    """
    if _in_triton(x, backend):
        return _TritonNorm.apply(x, weight, None, False, eps)
    if x.device.type != "cuda" and x.dim() > 1 and not torch.compiler.is_compiling():
        return _BlockedRMSNorm.apply(x, weight, eps)
    dtype = promote(x.dtype)
    wide = None if weight is None else cast(weight, dtype)
    return cast(F.rms_norm(cast(x, dtype), (x.shape[-1],), wide, eps), x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str = "auto") -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dim; result in x's dtype (Ba et al., 2016)."""
    if _in_triton(x, backend):
        return _TritonNorm.apply(x, weight, bias, True, eps)
    dtype = promote(x.dtype)
    wide = [None if t is None else cast(t, dtype) for t in (weight, bias)]
    return cast(F.layer_norm(cast(x, dtype), (x.shape[-1],), wide[0], wide[1], eps), x.dtype)


def norm(x: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str = "auto") -> Tensor:
    """``rms_norm`` or ``layer_norm`` by Megatron's names; a bias of RMSNorm is added in at least fp32."""
    if kind != "RMSNorm":
        return layer_norm(x, weight, bias, eps, backend)
    if bias is None:
        return rms_norm(x, weight, eps, backend)
    if _in_triton(x, backend):
        return _TritonNorm.apply(x, weight, bias, False, eps)
    wide = promote(x.dtype)
    return (rms_norm(x.to(wide), weight, eps, backend) + bias.to(wide)).to(x.dtype)


def is_one_pass_with_sum(x: Tensor, backend: str = "auto") -> bool:
    """Whether ``norm_of_sum`` takes x: there is only the kernel."""
    return _in_triton(x, backend)


def norm_of_sum(x: Tensor, output: Tensor, factor: float, parts: NormParts) -> tuple[Tensor, Tensor]:
    """x and output [..., D] -> factor x + output, and its norm, in one Triton pass; both in the wider of the dtypes.

    The sum is rounded before it is normed, as by ``torch.add`` and ``norm``; its gradients, through the norm and from
    what reads it later, are added in fp32 and rounded once.
    """
    return _TritonNormOfSum.apply(x, output, factor, parts.weight, parts.bias, parts.kind != "RMSNorm", parts.eps)


def _in_triton(x: Tensor, backend: str) -> bool:
    return x.shape[-1] <= WIDEST_IN_TRITON and replaces_torch(x, backend)


class _BlockedRMSNorm(torch.autograd.Function):
    """The operations of torch's ``rms_norm`` and of its gradients, in their order and to their bits, block by block.

    On a CPU torch runs a dozen operations one after another over the whole activation, and keeps its wide copy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        dtype = promote(x.dtype)
        wide_weight = None if weight is None else cast(weight, dtype)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        inverse = torch.empty(*x.shape[:-1], 1, dtype=dtype, device=x.device)
        for rows in row_blocks(x):
            wide = cast(x[rows], dtype)
            torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).add_(eps), out=inverse[rows])
            part = torch.mul(wide, inverse[rows], out=_room_in(y, rows, dtype))
            if wide_weight is not None:
                part.mul_(wide_weight)
            _put(part, y, rows)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_y: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        dtype = inverse.dtype
        wide_weight = None if weight is None else cast(weight, dtype)
        g_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        terms = None if weight is None else torch.empty(x.shape, dtype=dtype, device=x.device)
        for rows in row_blocks(x):
            wide, grad, factor = cast(x[rows], dtype), cast(g_y[rows], dtype), inverse[rows]
            if terms is not None and wide_weight is not None:
                torch.mul(grad, wide * factor, out=terms[rows])
                grad = grad * wide_weight
            along = (grad * wide).sum(-1, keepdim=True) * (factor.pow(3) * -0.5) / x.shape[-1] * 2
            part = torch.mul(grad, factor, out=_room_in(g_x, rows, dtype))
            _put(part.add_(wide * along), g_x, rows)
        g_weight = None if terms is None else cast(terms.sum(tuple(range(x.dim() - 1))), weight.dtype)
        return g_x, g_weight, None


def _room_in(result: Tensor, rows: slice, dtype: torch.dtype) -> Tensor | None:
    """Where rows of ``result`` are computed in ``dtype``: there, or elsewhere (None)."""
    return result[rows] if result.dtype == dtype else None


def _put(part: Tensor, result: Tensor, rows: slice) -> None:
    """Rows that ``_room_in`` had no room for into ``result``."""
    if part.dtype != result.dtype:
        result[rows] = part


class _TritonNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, is_centred: bool, eps: float
    ) -> Tensor:
        from megatron_hc.kernels import norm_triton

        x = x.contiguous()
        y, statistics = norm_triton.forward(x, weight, bias, is_centred, eps)
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.is_centred = is_centred
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_y: Tensor) -> tuple[Tensor | None, ...]:
        from megatron_hc.kernels import norm_triton

        x, weight, bias, statistics = ctx.saved_tensors
        return *norm_triton.backward(x, g_y, None, weight, bias, statistics, ctx.is_centred), None, None


class _TritonNormOfSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        output: Tensor,
        factor: float,
        weight: Tensor,
        bias: Tensor | None,
        is_centred: bool,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        from megatron_hc.kernels import norm_triton

        new, y, statistics = norm_triton.forward_of_sum(
            x.contiguous(), output.contiguous(), factor, weight, bias, is_centred, eps
        )
        ctx.save_for_backward(new, weight, bias, statistics)
        ctx.form = factor, is_centred, x.dtype, output.dtype
        return new, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_new: Tensor, g_y: Tensor) -> tuple[Tensor | None, ...]:
        from megatron_hc.kernels import norm_triton

        new, weight, bias, statistics = ctx.saved_tensors
        factor, is_centred, dtype_of_x, dtype_of_output = ctx.form
        grad, g_weight, g_bias = norm_triton.backward(new, g_y, g_new, weight, bias, statistics, is_centred)
        g_x = grad if factor == 1 else grad * factor
        return cast(g_x, dtype_of_x), cast(grad, dtype_of_output), None, g_weight, g_bias, None, None
