"""Rotary embedding, half-rotation layout, in one Triton pass; turned back, it is its own gradient.

Dims: S sequence, B batch, H head width. A program has some heads of one token. It reads heads that do not lie side by
side (the parts of a QKV product) and gradients in attention's layout as they are. Computed in fp32, rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PAIRS = 2048  # of one program, at most


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    x, cos, sin, y, num_heads, num_rows, stride_of_token, stride_of_row, stride_of_head, table_of_token, table_of_row,
    H: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, HALF_PADDED: tl.constexpr, REST_PADDED: tl.constexpr,
    IS_BACK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    s, b = token // num_rows, token % num_rows
    head, c = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, HALF_PADDED)
    angles = s * table_of_token + b * table_of_row + c
    of_cos = tl.load(cos + angles, mask=c < HALF, other=0.0)[None, :]
    of_sin = tl.load(sin + angles, mask=c < HALF, other=0.0)[None, :]
    if IS_BACK:
        of_sin = -of_sin
    source = x + s * stride_of_token + b * stride_of_row + head[:, None] * stride_of_head
    into = y + (token * num_heads + head[:, None]) * H
    is_head = (head < num_heads)[:, None]
    place, mask = c[None, :], is_head & (c < HALF)[None, :]
    first = tl.load(source + place, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(into + place, (first * of_cos - second * of_sin).to(y.dtype.element_ty), mask=mask)
    tl.store(into + HALF + place, (second * of_cos + first * of_sin).to(y.dtype.element_ty), mask=mask)
    if 2 * HALF < H:  # channels that are not turned
        rest = 2 * HALF + tl.arange(0, REST_PADDED)[None, :]
        same = tl.load(source + rest, mask=is_head & (rest < H), other=0.0)
        tl.store(into + rest, same, mask=is_head & (rest < H))


def turned(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """x [S, B, heads, H], fp32 tables [S, B or 1, 1, rotated], both halves of them alike -> [S, B, heads, H], in a row.

    The leading ``rotated`` channels are turned, forth (1) or back (-1); the others are copied.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    S, B, heads, H = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = cos.shape[-1] // 2
    padded = triton.next_power_of_2(half)
    together = min(triton.next_power_of_2(heads), max(1, PAIRS // padded))
    table_strides = cos.stride(0), cos.stride(1) if cos.shape[1] > 1 else 0
    _turn[(S * B, triton.cdiv(heads, together))](
        *(x, cos, sin, y, heads, B, *x.stride()[:3], *table_strides),
        **{"H": H, "HALF": half, "HEADS": together, "HALF_PADDED": padded, "IS_BACK": direction < 0},
        REST_PADDED=triton.next_power_of_2(max(1, H - 2 * half)),
        num_warps=min(8, max(1, together * padded // 256)),
    )
    return y
