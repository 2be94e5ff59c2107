"""What the Triton kernels of a boundary share: sums between threads, rounding, and sums over tokens.

Dims: P threads with V numbers each; T tokens, K logits, E columns of a program.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""The interpreter has neither inline assembly nor products of bf16."""


@triton.jit
def part_of_sum(x, P: tl.constexpr, V: tl.constexpr):  # type: ignore[no-untyped-def]
    """[P V] -> [P]: what lies in one thread."""
    return tl.sum(tl.reshape(x, [P, V]), 1)


@triton.jit
def rounded(x, dtype: tl.constexpr, IS_COMPILED: tl.constexpr):  # type: ignore[no-untyped-def]
    """To nearest; two numbers of bf16 by one instruction, which the compiler does not find if they are used again.

    The interpreter cuts off what bf16 has no room for, so that here nothing is left to be cut off.
    """
    if IS_COMPILED and dtype == tl.bfloat16:
        asm: tl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
        return tl.inline_asm_elementwise(asm, "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2)
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(x == x, (bits & 0xFFFF0000).to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit(do_not_specialize=["num_rows"])
def _sum_of_rows(  # type: ignore[no-untyped-def]
    rows, result, num_rows, width, stride, B: tl.constexpr, E: tl.constexpr
):  # fmt: skip
    """[rows, width] -> [width]"""
    d = tl.program_id(0) * E + tl.arange(0, E)
    total = tl.zeros([B, E], tl.float32)
    start = 0
    while start < num_rows:
        r = start + tl.arange(0, B)
        here = (r < num_rows)[:, None] & (d < width)[None, :]
        total += tl.load(rows + r[:, None].to(tl.int64) * stride + d[None, :], mask=here, other=0.0)
        start += B
    tl.store(result + d, tl.sum(total, 0), mask=d < width)


def sum_of_rows(rows: Tensor, result: Tensor) -> None:
    """[rows, ...], each in one piece -> the sum of the rows, in an order that depends on their number only; fp32."""
    count, width = rows.shape[0], rows.shape[1:].numel()
    if width:
        block = max(32, min(512, triton.next_power_of_2(count)))
        _sum_of_rows[(triton.cdiv(width, 16),)](
            rows, result, count, width, rows.stride(0), B=block, E=16, num_warps=block // 32
        )


@triton.jit(do_not_specialize=["num_rows"])
def _projection_gradient(  # type: ignore[no-untyped-def]
    g, rows, partial, num_rows, stride,
    WIDTH: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, ROWS: tl.constexpr, B: tl.constexpr, E: tl.constexpr,
    IS_COMPILED: tl.constexpr,
):  # fmt: skip
    """g^T rows: g [rows, stride] of which the first K count, rows [rows, WIDTH] -> [K, E] of this program's ROWS rows.

    Rows in bf16 are taken as they are, and g as a sum of three numbers of bf16, 24 bits: the products are exact.
    """
    k, d = tl.arange(0, KP), tl.program_id(0) * E + tl.arange(0, E)
    # The last rows first: who has just gone through them has left these in the second cache.
    part = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)
    first = part * ROWS
    g += first * stride
    rows += first * WIDTH
    count = num_rows - first
    total = tl.zeros([KP, E], tl.float32)
    for start in range(0, ROWS, B):
        r = start + tl.arange(0, B)
        is_row = r < count
        left = tl.load(g + r[None, :] * stride + k[:, None], mask=is_row[None, :] & (k < K)[:, None], other=0.0)
        right = tl.load(rows + r[:, None] * WIDTH + d[None, :], mask=is_row[:, None] & (d < WIDTH)[None, :], other=0.0)
        if IS_COMPILED and rows.dtype.element_ty == tl.bfloat16:
            high = left.to(tl.bfloat16)
            left -= high.to(tl.float32)
            middle = left.to(tl.bfloat16)
            low = (left - middle.to(tl.float32)).to(tl.bfloat16)
            total = tl.dot(low, right, total)
            total = tl.dot(middle, right, total)
            total = tl.dot(high, right, total)
        else:
            total = tl.dot(left, right.to(tl.float32), total, input_precision="tf32x3")
    into = partial + (part * K + k[:, None]) * WIDTH + d[None, :]
    tl.store(into, total, mask=(k < K)[:, None] & (d < WIDTH)[None, :])


def multiprocessors(device: torch.device) -> int:
    """How many parts of a GPU work side by side; a small number elsewhere (the interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def projection_gradient(g: Tensor, rows: Tensor, num_logits: int) -> Tensor:
    """g [rows, K + 2] in fp32, of which K count, and rows [rows, width] -> their product, W's gradient [K, width]."""
    (count, width), K = rows.shape, num_logits
    E = 128 if IS_INTERPRETED else 512 // rows.element_size()
    blocks = triton.cdiv(width, E)
    of_program = 128
    while not IS_INTERPRETED and of_program < 1024 and blocks * count > 4 * of_program * multiprocessors(rows.device):
        of_program *= 2
    parts = triton.cdiv(count, of_program)
    partial = torch.empty(parts, K, width, dtype=torch.float32, device=rows.device)
    _projection_gradient[(blocks, parts)](
        *(g, rows, partial, count, g.shape[-1]),
        **{"WIDTH": width, "K": K, "KP": max(16, triton.next_power_of_2(K)), "ROWS": of_program, "B": 32, "E": E},
        **{"IS_COMPILED": not IS_INTERPRETED, "num_warps": 4, "num_stages": 4},
    )
    result = torch.empty(K, width, dtype=torch.float32, device=rows.device)
    sum_of_rows(partial, result)
    return result


def take(constants: dict[str, Any], *names: str) -> dict[str, Any]:
    """Those of a kernel."""
    return {name: constants[name] for name in names}
