"""A boundary of mHC in Triton: one kernel forward, two and a small one for Sinkhorn backward.

Dims: T tokens, N streams, D their width C, K = N^2 + 2 N logits, M tokens of a program (BLOCK_M), E of D at a time.

W has K rows of N D numbers, too many to pass by every token: a program takes M tokens and walks over D, so that logits
are a matrix product. Forward: first walk H' and logits; then sigmoids and Sinkhorn on chip; second walk, over H' that
the program has just written and the cache still has, the read; third, its norm. Backward: a kernel from x to the read
weights, Sinkhorn's gradient on N x N numbers per token, a kernel from the logits to H and Y.

These kernels have run in Triton's interpreter only, not on a GPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_hc.kernels.boundary_results import NORMS, empty_gradients, empty_results, pointer, unexpanded
from megatron_hc.kernels.coefficients import Form

BLOCK_M = 16


def can_do(form: Form, streams: Tensor) -> bool:
    """Static and dynamic weights of mHC in the paper's form."""
    return form.kind == "sinkhorn" and 2 <= form.num_streams <= 8


@triton.jit
def _column(matrix, index, k: tl.constexpr):  # type: ignore[no-untyped-def]
    """Column k of [M, KP] -> [M]"""
    return tl.sum(tl.where(index[None, :] == k, matrix, 0.0), 1)


@triton.jit
def _sinkhorn(logits, valid, iterations: tl.constexpr, FLOOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """[M, new, old] -> columns, then rows normalised ``iterations`` times; padding is 0."""
    top = tl.max(tl.where(valid, logits, float("-inf")), 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    matrix = tl.where(valid, tl.exp(tl.maximum(logits - top[:, None, :], FLOOR)), 0.0)
    for _ in range(iterations):
        total = tl.sum(matrix, 1)
        matrix = matrix / tl.where(total == 0.0, 1.0, total)[:, None, :]
        total = tl.sum(matrix, 2)
        matrix = matrix / tl.where(total == 0.0, 1.0, total)[:, :, None]
    return matrix


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    h, y, write, keep, w, scales, bias, norm_weight, norm_bias,
    new, x, next_read, next_write, next_keep, statistics, norm_statistics, num_tokens, eps, norm_eps, stream_stride,
    N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, NP: tl.constexpr, KP: tl.constexpr, M: tl.constexpr,
    E: tl.constexpr, HAS_OUTPUT: tl.constexpr, IS_DYNAMIC: tl.constexpr, NORM: tl.constexpr,
    ITERATIONS: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    is_token = t < num_tokens
    j, k, e = tl.arange(0, NP), tl.arange(0, KP), tl.arange(0, NP * E)
    token = h + t * (D + (N - 1) * stream_stride)
    z = tl.zeros([M, KP], tl.float32)
    square = tl.zeros([M], tl.float32)
    for start in range(0, D, E):
        d = start + tl.arange(0, E)
        flat = is_token[:, None] & (d < D)[None, :]
        cube = is_token[:, None, None] & (j < N)[None, :, None] & (d < D)[None, None, :]
        if HAS_OUTPUT:
            part = tl.load(y + t[:, None] * D + d[None, :], mask=flat, other=0.0).to(tl.float32)
            of_token = is_token[:, None] & (j < N)[None, :]
            weight = tl.load(write + t[:, None] * N + j[None, :], mask=of_token, other=0.0)
            total = weight[:, :, None] * part[:, None, :]
            for s in tl.static_range(N):
                stream = tl.load(token[:, None] + s * stream_stride + d[None, :], mask=flat, other=0.0)
                weight = tl.load(keep + (t[:, None] * N + s) * N + j[None, :], mask=of_token, other=0.0)
                total += weight[:, :, None] * stream.to(tl.float32)[:, None, :]
        else:
            offsets = j[None, :, None] * stream_stride + d[None, None, :]
            total = tl.load(token[:, None, None] + offsets, mask=cube, other=0.0).to(tl.float32)
        stored = total.to(new.dtype.element_ty)
        tl.store(new + (t[:, None, None] * N + j[None, :, None]) * D + d[None, None, :], stored, mask=cube)
        rows = tl.where(cube, stored.to(tl.float32), 0.0)
        square += tl.sum(tl.sum(rows * rows, 2), 1)
        if IS_DYNAMIC:
            stream_of, at = e // E, start + e % E
            inside = ((stream_of < N) & (at < D))[:, None] & (k < K)[None, :]
            pointers = w + k[None, :].to(tl.int64) * (N * D) + (stream_of * D + at)[:, None]
            phi = tl.load(pointers, mask=inside, other=0.0)
            z += tl.dot(tl.reshape(rows, [M, NP * E]), phi, input_precision="tf32x3")
    logits = tl.load(bias + k, mask=k < K, other=0.0)[None, :] + tl.zeros([M, KP], tl.float32)
    if IS_DYNAMIC:
        mean_square = square / (N * D)
        of_row = statistics + t * (K + 2)
        tl.store(of_row[:, None] + k[None, :], z, mask=is_token[:, None] & (k < K)[None, :])
        tl.store(of_row + K, tl.zeros([M], tl.float32), mask=is_token)
        tl.store(of_row + K + 1, mean_square, mask=is_token)
        logits += z * tl.rsqrt(mean_square + eps)[:, None] * tl.load(scales + k, mask=k < K, other=0.0)[None, :]
    read = tl.zeros([M, NP], tl.float32)
    matrix = tl.zeros([M, NP, NP], tl.float32)
    for a in tl.static_range(N):
        read = tl.where((j == a)[None, :], tl.sigmoid(_column(logits, k, a))[:, None], read)
        tl.store(next_write + t * N + a, 2 * tl.sigmoid(_column(logits, k, N + a)), mask=is_token)
        for b in tl.static_range(N):
            one = (j == a)[None, :, None] & (j == b)[None, None, :]
            matrix = tl.where(one, _column(logits, k, 2 * N + a * N + b)[:, None, None], matrix)
    valid = (j < N)[None, :, None] & (j < N)[None, None, :] & is_token[:, None, None]
    matrix = _sinkhorn(matrix, valid, ITERATIONS, FLOOR)
    tl.store(next_read + t[:, None] * N + j[None, :], read, mask=is_token[:, None] & (j < N)[None, :])
    # keep[old, new] is the transpose of H_res[new, old].
    tl.store(next_keep + (t[:, None, None] * N + j[None, None, :]) * N + j[None, :, None], matrix, mask=valid)
    tl.debug_barrier()  # H' was written by other threads of the program
    total = tl.zeros([M], tl.float32)
    square = tl.zeros([M], tl.float32)
    mean = tl.zeros([M], tl.float32)
    inverse = tl.zeros([M], tl.float32) + 1.0
    if NORM > 0:
        for start in range(0, D, E):
            d = start + tl.arange(0, E)
            cube = is_token[:, None, None] & (j < N)[None, :, None] & (d < D)[None, None, :]
            rows = tl.load(new + (t[:, None, None] * N + j[None, :, None]) * D + d[None, None, :], mask=cube, other=0.0)
            value = tl.sum(read[:, :, None] * rows.to(tl.float32), 1)
            total += tl.sum(value, 1)
            square += tl.sum(value * value, 1)
        variance = square / D
        if NORM == 2:
            mean = total / D
            variance -= mean * mean
        inverse = tl.rsqrt(variance + norm_eps)
        tl.store(norm_statistics + 2 * t, mean, mask=is_token)
        tl.store(norm_statistics + 2 * t + 1, inverse, mask=is_token)
    for start in range(0, D, E):
        d = start + tl.arange(0, E)
        cube = is_token[:, None, None] & (j < N)[None, :, None] & (d < D)[None, None, :]
        rows = tl.load(new + (t[:, None, None] * N + j[None, :, None]) * D + d[None, None, :], mask=cube, other=0.0)
        value = tl.sum(read[:, :, None] * rows.to(tl.float32), 1)
        if NORM > 0:
            value = (value - mean[:, None]) * inverse[:, None]
            value = value * tl.load(norm_weight + d, mask=d < D, other=0.0)[None, :]
            if NORM == 2:
                value += tl.load(norm_bias + d, mask=d < D, other=0.0)[None, :]
        flat = is_token[:, None] & (d < D)[None, :]
        tl.store(x + t[:, None] * D + d[None, :], value.to(x.dtype.element_ty), mask=flat)


@triton.jit
def _leave_backward(  # type: ignore[no-untyped-def]
    g_x, new, read, norm_weight, norm_statistics, g_mixed, g_read, partial, num_tokens,
    N: tl.constexpr, D: tl.constexpr, NP: tl.constexpr, M: tl.constexpr, E: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Gradient of the normed x -> of x [T, D], of the read weights, and the program's part of weight and bias."""
    t = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    is_token, j = t < num_tokens, tl.arange(0, NP)
    of_token = is_token[:, None] & (j < N)[None, :]
    weights = tl.load(read + t[:, None] * N + j[None, :], mask=of_token, other=0.0)
    mean = tl.zeros([M], tl.float32)
    inverse = tl.zeros([M], tl.float32)
    along = tl.zeros([M], tl.float32)
    offset = tl.zeros([M], tl.float32)
    if NORM > 0:
        mean = tl.load(norm_statistics + 2 * t, mask=is_token, other=0.0)
        inverse = tl.load(norm_statistics + 2 * t + 1, mask=is_token, other=0.0)
        for start in range(0, D, E):
            d = start + tl.arange(0, E)
            flat = is_token[:, None] & (d < D)[None, :]
            cube = of_token[:, :, None] & (d < D)[None, None, :]
            rows = tl.load(new + (t[:, None, None] * N + j[None, :, None]) * D + d[None, None, :], mask=cube, other=0.0)
            value = tl.sum(weights[:, :, None] * rows.to(tl.float32), 1)
            hat = tl.where(flat, (value - mean[:, None]) * inverse[:, None], 0.0)
            grad = tl.load(g_x + t[:, None] * D + d[None, :], mask=flat, other=0.0).to(tl.float32)
            into = partial + tl.program_id(0).to(tl.int64) * 2 * D + d
            tl.store(into, tl.sum(grad * hat, 0), mask=d < D)
            tl.store(into + D, tl.sum(grad, 0), mask=d < D)
            grad = grad * tl.load(norm_weight + d, mask=d < D, other=0.0)[None, :]
            along += tl.sum(grad * hat, 1) / D
            if NORM == 2:
                offset += tl.sum(grad, 1) / D
    of_read = tl.zeros([M, NP], tl.float32)
    for start in range(0, D, E):
        d = start + tl.arange(0, E)
        flat = is_token[:, None] & (d < D)[None, :]
        cube = of_token[:, :, None] & (d < D)[None, None, :]
        rows = tl.load(new + (t[:, None, None] * N + j[None, :, None]) * D + d[None, None, :], mask=cube, other=0.0)
        rows = rows.to(tl.float32)
        grad = tl.load(g_x + t[:, None] * D + d[None, :], mask=flat, other=0.0).to(tl.float32)
        if NORM > 0:
            hat = (tl.sum(weights[:, :, None] * rows, 1) - mean[:, None]) * inverse[:, None]
            grad = grad * tl.load(norm_weight + d, mask=d < D, other=0.0)[None, :]
            grad = tl.where(flat, (grad - hat * along[:, None] - offset[:, None]) * inverse[:, None], 0.0)
        tl.store(g_mixed + t[:, None] * D + d[None, :], grad, mask=flat)
        of_read += tl.sum(rows * grad[:, None, :], 2)
    tl.store(g_read + t[:, None] * N + j[None, :], of_read, mask=of_token)


@triton.jit
def _sinkhorn_backward(  # type: ignore[no-untyped-def]
    logits, grad, sums, result, num_tokens,
    N: tl.constexpr, NP: tl.constexpr, M: tl.constexpr, ITERATIONS: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """Logits and gradient [T, N, N] -> gradient of the logits. ``sums`` [2 ITERATIONS, T, N] is scratch."""
    t = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    is_token, j = t < num_tokens, tl.arange(0, NP)
    valid = (j < N)[None, :, None] & (j < N)[None, None, :] & is_token[:, None, None]
    of_token = is_token[:, None] & (j < N)[None, :]
    offsets = (t[:, None, None] * N + j[None, :, None]) * N + j[None, None, :]
    small = t[:, None] * N + j[None, :]
    values = tl.load(logits + offsets, mask=valid, other=0.0)
    top = tl.max(tl.where(valid, values, float("-inf")), 1)
    shifted = values - tl.where(top == float("-inf"), 0.0, top)[:, None, :]
    matrix = tl.where(valid, tl.exp(tl.maximum(shifted, FLOOR)), 0.0)
    for step in range(ITERATIONS):
        total = tl.sum(matrix, 1)
        total = tl.where(total == 0.0, 1.0, total)
        tl.store(sums + (2 * step) * num_tokens * N + small, total, mask=of_token)
        matrix = matrix / total[:, None, :]
        total = tl.sum(matrix, 2)
        total = tl.where(total == 0.0, 1.0, total)
        tl.store(sums + (2 * step + 1) * num_tokens * N + small, total, mask=of_token)
        matrix = matrix / total[:, :, None]
    tl.debug_barrier()
    g = tl.load(grad + offsets, mask=valid, other=0.0)
    for back in range(ITERATIONS):
        step = ITERATIONS - 1 - back
        total = tl.load(sums + (2 * step + 1) * num_tokens * N + small, mask=of_token, other=1.0)
        g = (g - tl.sum(g * matrix, 2)[:, :, None]) / total[:, :, None]
        matrix = matrix * total[:, :, None]
        total = tl.load(sums + (2 * step) * num_tokens * N + small, mask=of_token, other=1.0)
        g = (g - tl.sum(g * matrix, 1)[:, None, :]) / total[:, None, :]
        matrix = matrix * total[:, None, :]
    tl.store(result + offsets, tl.where(shifted > FLOOR, g * matrix, 0.0), mask=valid)


@triton.jit
def _enter_backward(  # type: ignore[no-untyped-def]
    g_new, g_mixed, read, new, g_statistics, h, y, write, keep, w, g_h, g_y, g_write, g_keep, num_tokens, stream_stride,
    N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, NP: tl.constexpr, KP: tl.constexpr, M: tl.constexpr,
    E: tl.constexpr, HAS_OUTPUT: tl.constexpr, IS_DYNAMIC: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    is_token = t < num_tokens
    j, k, e = tl.arange(0, NP), tl.arange(0, KP), tl.arange(0, NP * E)
    of_token = is_token[:, None] & (j < N)[None, :]
    weights = tl.load(read + t[:, None] * N + j[None, :], mask=of_token, other=0.0)
    share = tl.zeros([M], tl.float32)
    g_z = tl.zeros([M, KP], tl.float32)
    if IS_DYNAMIC:
        of_row = g_statistics + t * (K + 2)
        g_z = tl.load(of_row[:, None] + k[None, :], mask=is_token[:, None] & (k < K)[None, :], other=0.0)
        share = tl.load(of_row + K + 1, mask=is_token, other=0.0) * (2.0 / (N * D))
    of_write = tl.zeros([M, NP], tl.float32)
    of_keep = tl.zeros([M, NP, NP], tl.float32)  # [old, new]
    for start in range(0, D, E):
        d = start + tl.arange(0, E)
        flat = is_token[:, None] & (d < D)[None, :]
        cube = of_token[:, :, None] & (d < D)[None, None, :]
        offsets = (t[:, None, None] * N + j[None, :, None]) * D + d[None, None, :]
        grad = tl.load(g_new + offsets, mask=cube, other=0.0).to(tl.float32)
        dx = tl.load(g_mixed + t[:, None] * D + d[None, :], mask=flat, other=0.0)
        grad += weights[:, :, None] * dx[:, None, :]
        if IS_DYNAMIC:
            stream_of, at = e // E, start + e % E
            inside = (k < K)[:, None] & ((stream_of < N) & (at < D))[None, :]
            pointers = w + k[:, None].to(tl.int64) * (N * D) + (stream_of * D + at)[None, :]
            phi = tl.load(pointers, mask=inside, other=0.0)
            grad += tl.reshape(tl.dot(g_z, phi, input_precision="tf32x3"), [M, NP, E])
            grad += share[:, None, None] * tl.load(new + offsets, mask=cube, other=0.0).to(tl.float32)
        # Rounded, as it is where a stage boundary lies between the write and the read.
        rounded = grad.to(g_h.dtype.element_ty)
        if HAS_OUTPUT:
            grad = tl.where(cube, rounded.to(tl.float32), 0.0)
            part = tl.load(y + t[:, None] * D + d[None, :], mask=flat, other=0.0).to(tl.float32)
            of_write += tl.sum(grad * part[:, None, :], 2)
            weight = tl.load(write + t[:, None] * N + j[None, :], mask=of_token, other=0.0)
            result = tl.sum(weight[:, :, None] * grad, 1)
            tl.store(g_y + t[:, None] * D + d[None, :], result.to(g_y.dtype.element_ty), mask=flat)
            for s in tl.static_range(N):
                at_stream = t[:, None] * (D + (N - 1) * stream_stride) + s * stream_stride + d[None, :]
                stream = tl.load(h + at_stream, mask=flat, other=0.0).to(tl.float32)
                products = tl.sum(grad * stream[:, None, :], 2)
                of_keep += tl.where((j == s)[None, :, None], products[:, None, :], 0.0)
                weight = tl.load(keep + (t[:, None] * N + s) * N + j[None, :], mask=of_token, other=0.0)
                result = tl.sum(weight[:, :, None] * grad, 1)
                at_stream = (t[:, None] * N + s) * D + d[None, :]
                tl.store(g_h + at_stream, result.to(g_h.dtype.element_ty), mask=flat)
        else:
            tl.store(g_h + offsets, rounded, mask=cube)
    if HAS_OUTPUT:
        tl.store(g_write + t[:, None] * N + j[None, :], of_write, mask=of_token)
        valid = of_token[:, :, None] & (j < N)[None, None, :]
        tl.store(g_keep + (t[:, None, None] * N + j[None, :, None]) * N + j[None, None, :], of_keep, mask=valid)


def _sizes(streams: Tensor, num_logits: int) -> dict[str, int]:
    _, N, D = streams.shape
    NP = triton.next_power_of_2(N)
    # A program's part of H' in registers: M NP E numbers.
    width = max(16, min(128 // NP * 2, triton.next_power_of_2(D)))
    return {
        **{"N": N, "D": D, "K": num_logits, "NP": NP, "KP": max(16, triton.next_power_of_2(num_logits))},
        **{"M": BLOCK_M, "E": width},
    }


def _floor() -> float:
    return 0.9 * math.log(torch.finfo(torch.float32).tiny)  # as in sinkhorn.py


def _scales(form: Form, parameters: list[Tensor]) -> Tensor:
    """alpha [3] -> one number per logit, [K]."""
    N, bias = form.num_streams, parameters[0]
    if len(parameters) == 1:
        return bias
    return parameters[1].repeat_interleave(torch.tensor([N, N, N * N], device=bias.device), output_size=bias.shape[0])


def forward(
    form: Form,
    streams: Tensor,
    output: Tensor | None,
    write: Tensor | None,
    keep: Tensor | None,
    projection: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    parameters: list[Tensor],
) -> tuple[Tensor, ...]:
    """-> H', x, write', keep', read', the statistics, those of the norm: as ``boundary`` has them."""
    T, N, D = streams.shape
    K = N * N + 2 * N
    results = empty_results(streams, 1, projection, form.norm)
    new, x, next_write, next_keep, read, statistics, norm_statistics = results
    h, stride = unexpanded(streams)
    _forward[(triton.cdiv(T, BLOCK_M),)](
        *(h, pointer(output, h), pointer(write, x), pointer(keep, x), pointer(projection, x)),
        *(_scales(form, parameters), parameters[0].contiguous(), pointer(norm_weight, x), pointer(norm_bias, x)),
        *(new, x, read, next_write, next_keep, statistics, norm_statistics, T, form.eps, form.norm_eps, stride),
        **_sizes(streams, K),
        HAS_OUTPUT=output is not None,
        IS_DYNAMIC=projection is not None,
        NORM=NORMS[form.norm],
        ITERATIONS=form.iterations,
        FLOOR=_floor(),
    )
    return results


def leave_backward(
    form: Form, grad: Tensor, new: Tensor, read: Tensor, found: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``boundary_blocks.leave_backward``."""
    T, N, D = new.shape
    programs = triton.cdiv(T, BLOCK_M)
    g_mixed = torch.empty(T, 1, D, dtype=torch.float32, device=new.device)
    g_read = torch.empty_like(read)
    partial = torch.zeros(programs if form.norm else 1, 2, D, dtype=torch.float32, device=new.device)
    sizes = _sizes(new, 1)
    _leave_backward[(programs,)](
        *(grad.contiguous(), new, read, pointer(weight, read), found, g_mixed, g_read, partial, T),
        **{name: sizes[name] for name in ("N", "D", "NP", "M", "E")},
        NORM=NORMS[form.norm],
    )
    return g_mixed, g_read, partial.sum(0)


def sinkhorn_gradient(logits: Tensor, grad: Tensor, iterations: int) -> Tensor:
    """Logits and gradient [T, N, N] -> gradient of the logits."""
    T, N, _ = logits.shape
    logits, grad = logits.contiguous(), grad.contiguous()
    sums = torch.empty(2 * iterations, T, N, dtype=torch.float32, device=logits.device)
    result = torch.empty_like(logits)
    _sinkhorn_backward[(triton.cdiv(T, BLOCK_M),)](
        *(logits, grad, sums, result, T),
        N=N,
        NP=triton.next_power_of_2(N),
        M=BLOCK_M,
        ITERATIONS=iterations,
        FLOOR=_floor(),
    )
    return result


def enter_backward(
    form: Form,
    g_new: Tensor,
    g_mixed: Tensor,
    read: Tensor,
    new: Tensor,
    statistics: Tensor,
    g_statistics: Tensor,
    streams: Tensor,
    output: Tensor | None,
    write: Tensor | None,
    keep: Tensor | None,
    projection: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``boundary_blocks.enter_backward``."""
    T, N, D = new.shape
    K = N * N + 2 * N
    wide: dict[str, Any] = {"dtype": torch.float32, "device": new.device}
    g_streams, *written = empty_gradients(streams, output, write, keep)
    h, stride = unexpanded(streams)
    _enter_backward[(triton.cdiv(T, BLOCK_M),)](
        *(g_new.contiguous(), g_mixed, read, new, g_statistics, h, pointer(output, h), pointer(write, read)),
        *(pointer(keep, read), pointer(projection, read), g_streams, *written, T, stride),
        **_sizes(new, K),
        HAS_OUTPUT=output is not None,
        IS_DYNAMIC=projection is not None,
    )
    g_projection = torch.empty(0, **wide)
    if projection is not None:
        g_projection = g_statistics.view(T, K + 2)[:, :K].t() @ new.view(T, N * D).float()
    return g_streams, written[0], written[1], written[2], g_projection
