"""SwiGLU and its gradient on interleaved gate, up, gate, up ... in Triton.

Dims: F ffn size; any leading dims. One pass each: forward reads 2 F numbers and writes F, backward reads 3 F and writes
2 F. Computed in fp32 and rounded once; the formula in torch rounds silu(gate) before it is multiplied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PAIRS = 1024  # of one program


@triton.jit
def _gate_and_up(h, first, count, PAIRS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pairs from ``first`` on, read as they lie and then parted."""
    place = tl.arange(0, 2 * PAIRS)
    both = tl.load(h + 2 * first + place, mask=place < 2 * (count - first), other=0.0).to(tl.float32)
    return tl.split(tl.reshape(both, [PAIRS, 2]))


@triton.jit
def _forward(h, y, count, PAIRS: tl.constexpr):  # type: ignore[no-untyped-def]
    first = tl.program_id(0).to(tl.int64) * PAIRS
    gate, up = _gate_and_up(h, first, count, PAIRS)
    place = tl.arange(0, PAIRS)
    tl.store(y + first + place, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=place < count - first)


@triton.jit
def _backward(h, g_y, g_h, count, PAIRS: tl.constexpr):  # type: ignore[no-untyped-def]
    first = tl.program_id(0).to(tl.int64) * PAIRS
    gate, up = _gate_and_up(h, first, count, PAIRS)
    place, twice = tl.arange(0, PAIRS), tl.arange(0, 2 * PAIRS)
    grad = tl.load(g_y + first + place, mask=place < count - first, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    g_gate = grad * up * share * (1 + gate * (1 - share))
    both = tl.reshape(tl.join(g_gate, grad * gate * share), [2 * PAIRS])
    tl.store(g_h + 2 * first + twice, both.to(g_h.dtype.element_ty), mask=twice < 2 * (count - first))


def forward(h: Tensor) -> Tensor:
    """[..., 2 F] -> [..., F]"""
    h = h.contiguous()
    y = torch.empty(*h.shape[:-1], h.shape[-1] // 2, dtype=h.dtype, device=h.device)
    _forward[(triton.cdiv(y.numel(), PAIRS),)](h, y, y.numel(), PAIRS=PAIRS, num_warps=4)
    return y


def backward(h: Tensor, g_y: Tensor) -> Tensor:
    """[..., 2 F], gradient of the result [..., F] -> gradient of h"""
    h, g_y = h.contiguous(), g_y.contiguous()
    g_h = torch.empty_like(h)
    _backward[(triton.cdiv(g_y.numel(), PAIRS),)](h, g_y, g_h, g_y.numel(), PAIRS=PAIRS, num_warps=4)
    return g_h
