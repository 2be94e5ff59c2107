"""RMSNorm and LayerNorm, alone or behind the sum of the plain residual: one Triton kernel forward and one backward.

Dims: T rows, D normed width. A program holds whole rows: forward reads D numbers per row (with the sum 2 D) and writes
D (2 D), backward reads 2 D (3 D) and writes D. The backward pass has a fixed number of programs that walk over the
rows; what is summed over rows leaves them as partial sums in fp32, which are added in a fixed order. Computed in fp32
and rounded once; the sum is rounded to the stream's dtype before it is normed, as it is where nothing is fused.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x, output, weight, bias, new, y, statistics, num_rows, factor, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    IS_SUM: tl.constexpr, IS_CENTRED: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    t, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    place = t.to(tl.int64)[:, None] * D + d[None, :]
    mask, column = (t < num_rows)[:, None] & (d < D)[None, :], d < D
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    if IS_SUM:
        total = value * factor + tl.load(output + place, mask=mask, other=0.0).to(tl.float32)
        stored = total.to(new.dtype.element_ty)
        tl.store(new + place, stored, mask=mask)
        value = stored.to(tl.float32)
    if IS_CENTRED:
        mean = tl.sum(value, 1) / D
        tl.store(statistics + num_rows + t, mean, mask=t < num_rows)
        value = tl.where(mask, value - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(value * value, 1) / D + eps)
    tl.store(statistics + t, inverse, mask=t < num_rows)
    value = value * inverse[:, None]
    if HAS_WEIGHT:
        value = value * tl.load(weight + d, mask=column, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        value = value + tl.load(bias + d, mask=column, other=0.0).to(tl.float32)[None, :]
    tl.store(y + place, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    x, g_y, g_new, weight, statistics, g_x, partial, num_rows,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    IS_SUM: tl.constexpr, IS_CENTRED: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """``x``: what was normed. A program takes every ``num_programs``-th tile of rows."""
    d = tl.arange(0, WIDTH)
    column = d < D
    of_weight = tl.zeros([WIDTH], tl.float32)
    of_bias = tl.zeros([WIDTH], tl.float32)
    if HAS_WEIGHT:
        scale = tl.load(weight + d, mask=column, other=0.0).to(tl.float32)
    tile = tl.program_id(0)
    while tile * ROWS < num_rows:
        t = tile * ROWS + tl.arange(0, ROWS)
        place = t.to(tl.int64)[:, None] * D + d[None, :]
        mask = (t < num_rows)[:, None] & column[None, :]
        hat = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(g_y + place, mask=mask, other=0.0).to(tl.float32)
        if IS_SUM:
            later = tl.load(g_new + place, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.load(statistics + t, mask=t < num_rows, other=0.0)
        if IS_CENTRED:
            hat = hat - tl.load(statistics + num_rows + t, mask=t < num_rows, other=0.0)[:, None]
        hat = tl.where(column[None, :], hat * inverse[:, None], 0.0)
        if HAS_BIAS:
            of_bias += tl.sum(grad, 0)
        if HAS_WEIGHT:
            of_weight += tl.sum(grad * hat, 0)
            grad = grad * scale[None, :]
        result = grad - hat * (tl.sum(grad * hat, 1) / D)[:, None]
        if IS_CENTRED:
            result = result - (tl.sum(grad, 1) / D)[:, None]
        result = result * inverse[:, None]
        if IS_SUM:
            result += later
        tl.store(g_x + place, result.to(g_x.dtype.element_ty), mask=mask)
        tile += tl.num_programs(0)
    into = partial + tl.program_id(0).to(tl.int64) * 2 * D + d
    if HAS_WEIGHT:
        tl.store(into, of_weight, mask=column)
    if HAS_BIAS:
        tl.store(into + D, of_bias, mask=column)


def _constants(D: int, weight: Tensor | None, bias: Tensor | None, is_centred: bool, is_sum: bool) -> dict[str, Any]:
    width = triton.next_power_of_2(D)
    rows = max(1, 2048 // width)
    return {
        **{"D": D, "WIDTH": width, "ROWS": rows, "IS_SUM": is_sum, "IS_CENTRED": is_centred},
        **{"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None},
        "num_warps": max(4, width // 512),
    }


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, is_centred: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """x [..., D] in a row, weight and bias [D] -> its norm in x's dtype, statistics fp32 [2, T] (1 / rms, the mean)."""
    _, y, statistics = _run_forward(x, None, 1.0, weight, bias, is_centred, eps)
    return y, statistics


def forward_of_sum(
    x: Tensor, output: Tensor, factor: float, weight: Tensor | None, bias: Tensor | None, is_centred: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x and output [..., D], in a row -> factor x + output in the wider of their dtypes, its norm, the statistics."""
    return _run_forward(x, output, factor, weight, bias, is_centred, eps)


def _run_forward(
    x: Tensor,
    output: Tensor | None,
    factor: float,
    weight: Tensor | None,
    bias: Tensor | None,
    is_centred: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    assert x.is_contiguous() and (output is None or output.is_contiguous())
    D = x.shape[-1]
    T = x.numel() // D
    new = x if output is None else torch.empty_like(x, dtype=torch.promote_types(x.dtype, output.dtype))
    y, statistics = torch.empty_like(new), torch.empty(2, T, dtype=torch.float32, device=x.device)
    constants = _constants(D, weight, bias, is_centred, output is not None)
    unused = [x if t is None else t for t in (output, weight, bias)]
    _forward[(triton.cdiv(T, constants["ROWS"]),)](x, *unused, new, y, statistics, T, factor, eps, **constants)
    return new, y, statistics


def _num_programs(device: torch.device, num_warps: int) -> int:
    """16 warps per multiprocessor, which their registers have room for; a constant elsewhere (the interpreter)."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count * max(1, 16 // num_warps)


def backward(
    x: Tensor,
    g_y: Tensor,
    g_new: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    is_centred: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What was normed [..., D], gradients of its norm and (None: there is none) of itself -> whole gradients of it, of
    weight and bias (None where they are)."""
    assert x.is_contiguous()
    D = x.shape[-1]
    T = x.numel() // D
    constants = _constants(D, weight, bias, is_centred, g_new is not None)
    programs = max(1, min(triton.cdiv(T, constants["ROWS"]), _num_programs(x.device, constants["num_warps"])))
    partial = torch.empty(programs, 2, D, dtype=torch.float32, device=x.device)
    g_x, g_y = torch.empty_like(x), g_y.contiguous()
    later = g_y if g_new is None else g_new.contiguous()
    _backward[(programs,)](x, g_y, later, x if weight is None else weight, statistics, g_x, partial, T, **constants)
    g_weight = None if weight is None else partial[:, 0].sum(0).to(weight.dtype)
    return g_x, g_weight, None if bias is None else partial[:, 1].sum(0).to(bias.dtype)
