"""A boundary of hyper- and frac-connections as one Triton kernel forward and one backward.

Dims: T tokens, N streams, D width of one stream, R parts read and written (1, or N), K = R + N + 1 logits per stream.

A program holds all streams of a token in registers: the forward pass reads (n + 1) C numbers per token and writes
(n + 1) C, the backward pass reads (3 n + 2) C and writes (n + 1) C (the product for W's gradient reads n C more), for
any N and D (masked up to powers of two) and any number of tokens, which is no constant of the kernel. The backward pass
has a fixed number of programs that walk over the tokens; what is summed over tokens leaves them as partial sums in
fp32, which are added in a fixed order.
Everything is computed in fp32 and rounded to the streams' dtype once.

These kernels have run in Triton's interpreter only, not on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_hc.kernels.boundary_results import NORMS, empty_gradients, empty_results, pointer, unexpanded
from megatron_hc.kernels.coefficients import Form


def can_do(form: Form, streams: Tensor) -> bool:
    """Static and dynamic weights of hyper- and frac-connections, with every token's streams in one program."""
    return form.kind == "tanh" and form.num_streams <= 8 and streams.shape[1] * streams.shape[2] <= 1 << 16


@triton.jit
def _norm_tile(  # type: ignore[no-untyped-def]
    x, mask, weight, bias, offsets, C: tl.constexpr, NORM: tl.constexpr, eps
):
    """x [RP, DP] -> its norm over all C numbers, mean and 1 / rms."""
    mean = 0.0
    if NORM == 2:
        mean = tl.sum(tl.sum(x, 1), 0) / C
        x = tl.where(mask, x - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(tl.sum(x * x, 1), 0) / C + eps)
    x = x * inverse * tl.load(weight + offsets, mask=mask, other=0.0)
    if NORM == 2:
        x += tl.load(bias + offsets, mask=mask, other=0.0)
    return x, mean, inverse


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    h, y, write, keep, w, static_read, static_keep, static_write, alpha, beta, norm_weight, norm_bias,
    new, x, next_read, next_write, next_keep, statistics, norm_statistics, eps, norm_eps, stream_stride,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, NP: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr,
    HAS_OUTPUT: tl.constexpr, IS_DYNAMIC: tl.constexpr, IS_CENTRED: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One token. ``stream_stride``: numbers from one stream to the next, 0 where all are the same embedding."""
    t = tl.program_id(0).to(tl.int64)
    K: tl.constexpr = R + N + 1
    i, d, r = tl.arange(0, NP), tl.arange(0, DP), tl.arange(0, RP)
    row, column = i < N, d < D
    tile, mask = i[:, None] * D + d[None, :], row[:, None] & column[None, :]
    token = h + t * (D + (N - 1) * stream_stride)
    if HAS_OUTPUT:
        total = tl.zeros([NP, DP], tl.float32)
        for s in tl.static_range(N):
            stream = tl.load(token + s * stream_stride + d, mask=column, other=0.0).to(tl.float32)
            total += tl.load(keep + (t * N + s) * N + i, mask=row, other=0.0)[:, None] * stream[None, :]
        for q in tl.static_range(R):
            part = tl.load(y + (t * R + q) * D + d, mask=column, other=0.0).to(tl.float32)
            total += tl.load(write + (t * R + q) * N + i, mask=row, other=0.0)[:, None] * part[None, :]
    else:
        total = tl.load(token + i[:, None] * stream_stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
    stored = total.to(new.dtype.element_ty)
    tl.store(new + t * N * D + tile, stored, mask=mask)
    rows = stored.to(tl.float32)
    of_row = statistics + (t * N + i) * (K + 2)
    mean = tl.zeros([NP], tl.float32)
    inverse = tl.zeros([NP], tl.float32)
    if IS_DYNAMIC:
        if IS_CENTRED:
            mean = tl.sum(rows, 1) / D
        centred = tl.where(mask, rows - mean[:, None], 0.0)
        variance = tl.sum(centred * centred, 1) / D
        inverse = tl.rsqrt(variance + eps)
        tl.store(of_row + K, mean, mask=row)
        tl.store(of_row + K + 1, variance, mask=row)
    xs = tl.zeros([RP, DP], tl.float32)
    for k in tl.static_range(K):
        if k < R:
            weight = tl.load(static_read + i * R + k, mask=row, other=0.0)
        elif k < R + N:
            weight = tl.load(static_keep + i * N + (k - R), mask=row, other=0.0)
        else:
            weight = tl.load(static_write + i, mask=row, other=0.0)
        if IS_DYNAMIC:
            wk = tl.load(w + k * D + d, mask=column, other=0.0)
            z = tl.sum(rows * wk[None, :], 1)
            tl.store(of_row + k, z, mask=row)
            if IS_CENTRED:
                z -= mean * tl.sum(wk, 0)
            scale = tl.load(alpha) if k < R + N else tl.load(beta)
            weight += scale * (2 * tl.sigmoid(2 * z * inverse) - 1)
        if k < R:
            tl.store(next_read + (t * N + i) * R + k, weight, mask=row)
            read = tl.sum(tl.where(row, weight, 0.0)[:, None] * rows, 0)
            xs = tl.where((r == k)[:, None], read[None, :], xs)
        elif k < R + N:
            tl.store(next_keep + (t * N + i) * N + (k - R), weight, mask=row)
        else:
            # One part: a row of N weights. N parts: the diagonal; the rest is zero already.
            tl.store(next_write + (t * N + i if R == 1 else (t * R + i) * N + i), weight, mask=row)
    part_offsets, part_mask = r[:, None] * D + d[None, :], (r < R)[:, None] & column[None, :]
    if NORM > 0:
        xs, of_mean, of_inverse = _norm_tile(xs, part_mask, norm_weight, norm_bias, part_offsets, R * D, NORM, norm_eps)
        tl.store(norm_statistics + 2 * t, of_mean)
        tl.store(norm_statistics + 2 * t + 1, of_inverse)
    tl.store(x + t * R * D + part_offsets, xs.to(x.dtype.element_ty), mask=part_mask)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    g_new, g_x, g_write, g_keep, h, y, write, keep, w, alpha, beta, norm_weight, new, read, statistics,
    norm_statistics, g_h, g_y, g_write_in, g_keep_in, g_read, g_statistics, partial, num_tokens, eps, stream_stride,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, NP: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr,
    HAS_OUTPUT: tl.constexpr, IS_DYNAMIC: tl.constexpr, IS_CENTRED: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Every program takes every ``num_programs``-th token; sums for the norm's weight and bias go to ``partial``."""
    K: tl.constexpr = R + N + 1
    C: tl.constexpr = R * D
    i, d, r = tl.arange(0, NP), tl.arange(0, DP), tl.arange(0, RP)
    row, column = i < N, d < D
    tile, mask = i[:, None] * D + d[None, :], row[:, None] & column[None, :]
    part_offsets, part_mask = r[:, None] * D + d[None, :], (r < R)[:, None] & column[None, :]
    of_weight = tl.zeros([RP, DP], tl.float32)
    of_bias = tl.zeros([RP, DP], tl.float32)
    t = tl.program_id(0).to(tl.int64)
    while t < num_tokens:
        rows = tl.load(new + t * N * D + tile, mask=mask, other=0.0).to(tl.float32)
        dx = tl.load(g_x + t * C + part_offsets, mask=part_mask, other=0.0).to(tl.float32)
        if NORM > 0:
            xs = tl.zeros([RP, DP], tl.float32)
            for q in tl.static_range(R):
                weight = tl.load(read + (t * N + i) * R + q, mask=row, other=0.0)
                xs = tl.where((r == q)[:, None], tl.sum(weight[:, None] * rows, 0)[None, :], xs)
            of_mean, of_inverse = tl.load(norm_statistics + 2 * t), tl.load(norm_statistics + 2 * t + 1)
            hat = tl.where(part_mask, (xs - of_mean) * of_inverse, 0.0)
            of_weight += dx * hat
            of_bias += dx
            dx = dx * tl.load(norm_weight + part_offsets, mask=part_mask, other=0.0)
            along = tl.sum(tl.sum(dx * hat, 1), 0) / C
            offset = tl.sum(tl.sum(dx, 1), 0) / C if NORM == 2 else 0.0
            dx = tl.where(part_mask, (dx - hat * along - offset) * of_inverse, 0.0)
        grad = tl.load(g_new + t * N * D + tile, mask=mask, other=0.0).to(tl.float32)
        of_row = (t * N + i) * (K + 2)
        mean = tl.zeros([NP], tl.float32)
        inverse = tl.zeros([NP], tl.float32)
        g_inverse = tl.zeros([NP], tl.float32)
        g_mean = tl.zeros([NP], tl.float32)
        if IS_DYNAMIC:
            mean = tl.load(statistics + of_row + K, mask=row, other=0.0)
            inverse = tl.rsqrt(tl.load(statistics + of_row + K + 1, mask=row, other=0.0) + eps)
        for k in tl.static_range(K):
            if k < R:
                part = tl.sum(tl.where((r == k)[:, None], dx, 0.0), 0)
                weight = tl.load(read + (t * N + i) * R + k, mask=row, other=0.0)
                grad += weight[:, None] * part[None, :]
                g = tl.sum(rows * part[None, :], 1)
                tl.store(g_read + (t * N + i) * R + k, g, mask=row)
            elif k < R + N:
                g = tl.load(g_keep + (t * N + i) * N + (k - R), mask=row, other=0.0)
            else:
                g = tl.load(g_write + (t * N + i if R == 1 else (t * R + i) * N + i), mask=row, other=0.0)
            if IS_DYNAMIC:
                wk = tl.load(w + k * D + d, mask=column, other=0.0)
                z = tl.load(statistics + of_row + k, mask=row, other=0.0)
                if IS_CENTRED:
                    z -= mean * tl.sum(wk, 0)
                th = 2 * tl.sigmoid(2 * z * inverse) - 1
                scale = tl.load(alpha) if k < R + N else tl.load(beta)
                g_logit = g * scale * (1 - th * th)
                g_z = g_logit * inverse
                tl.store(g_statistics + of_row + k, g_z, mask=row)
                g_inverse += g_logit * z
                if IS_CENTRED:
                    g_mean -= g_z * tl.sum(wk, 0)
                grad += g_z[:, None] * wk[None, :]
        if IS_DYNAMIC:
            g_variance = g_inverse * (-0.5) * inverse * inverse * inverse
            share = 2 * g_variance / D
            grad += share[:, None] * rows + (g_mean / D - share * mean)[:, None]
        # Rounded, as it is where a stage boundary lies between the write and the read.
        rounded = grad.to(g_h.dtype.element_ty)
        if HAS_OUTPUT:
            grad = tl.where(mask, rounded.to(tl.float32), 0.0)
            for s in tl.static_range(N):
                stream = tl.load(
                    h + t * (D + (N - 1) * stream_stride) + s * stream_stride + d, mask=column, other=0.0
                ).to(tl.float32)
                weight = tl.load(keep + (t * N + s) * N + i, mask=row, other=0.0)
                result = tl.sum(weight[:, None] * grad, 0)
                tl.store(g_h + (t * N + s) * D + d, result.to(g_h.dtype.element_ty), mask=column)
                tl.store(g_keep_in + (t * N + s) * N + i, tl.sum(grad * stream[None, :], 1), mask=row)
            for q in tl.static_range(R):
                part = tl.load(y + (t * R + q) * D + d, mask=column, other=0.0).to(tl.float32)
                weight = tl.load(write + (t * R + q) * N + i, mask=row, other=0.0)
                result = tl.sum(weight[:, None] * grad, 0)
                tl.store(g_y + (t * R + q) * D + d, result.to(g_y.dtype.element_ty), mask=column)
                tl.store(g_write_in + (t * R + q) * N + i, tl.sum(grad * part[None, :], 1), mask=row)
        else:
            tl.store(g_h + t * N * D + tile, rounded, mask=mask)
        t += tl.num_programs(0)
    if NORM > 0:
        into = partial + tl.program_id(0) * 2 * C + part_offsets
        tl.store(into, of_weight, mask=part_mask)
        tl.store(into + C, of_bias, mask=part_mask)


def _constants(form: Form, streams: Tensor, output: Tensor | None, projection: Tensor | None) -> dict[str, Any]:
    _, N, D = streams.shape
    numbers = triton.next_power_of_2(N) * triton.next_power_of_2(D)
    return {
        **{"N": N, "D": D, "R": form.num_reads, "NP": triton.next_power_of_2(N), "DP": triton.next_power_of_2(D)},
        "RP": triton.next_power_of_2(form.num_reads),
        **{"HAS_OUTPUT": output is not None, "IS_DYNAMIC": projection is not None},
        **{"IS_CENTRED": form.is_centred, "NORM": NORMS[form.norm]},
        "num_warps": 4 if numbers <= 4096 else 8 if numbers <= 16384 else 16,
    }


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
    results = empty_results(streams, form.num_reads, projection, form.norm)
    new, x, next_write, next_keep, read, statistics, norm_statistics = results
    if form.num_reads > 1:
        next_write.zero_()  # but for its diagonal
    h, stride = unexpanded(streams)
    static_read, static_keep, static_write = (p.contiguous() for p in parameters[:3])
    alpha, beta = parameters[3:] if projection is not None else (static_read, static_read)
    _forward[(streams.shape[0],)](
        *(h, pointer(output, h), pointer(write, x), pointer(keep, x), pointer(projection, x)),
        *(static_read, static_keep, static_write, alpha, beta, pointer(norm_weight, x), pointer(norm_bias, x)),
        *(new, x, read, next_write, next_keep, statistics, norm_statistics, form.eps, form.norm_eps, stride),
        **_constants(form, streams, output, projection),
    )
    return results


def num_programs(tokens: int, device: torch.device) -> int:
    """Programs of a backward pass: a few per multiprocessor; a constant elsewhere (the interpreter)."""
    if device.type != "cuda":
        return min(tokens, 4)
    return min(tokens, 4 * torch.cuda.get_device_properties(device).multi_processor_count)


def backward(
    form: Form,
    g_new: Tensor,
    g_x: Tensor,
    g_write: Tensor,
    g_keep: Tensor,
    streams: Tensor,
    output: Tensor | None,
    write: Tensor | None,
    keep: Tensor | None,
    projection: Tensor | None,
    norm_weight: Tensor | None,
    parameters: list[Tensor],
    new: Tensor,
    read: Tensor,
    statistics: Tensor,
    norm_statistics: Tensor,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """-> gradients of H, Y, write, keep, W ([0] where absent), of read', and [2, C] of the norm's weight and bias."""
    T, N, D = new.shape
    C, K = form.num_reads * D, form.num_reads + N + 1
    wide: dict[str, Any] = {"dtype": torch.float32, "device": new.device}
    g_streams, *written = empty_gradients(streams, output, write, keep)
    g_read = torch.empty_like(read)
    g_statistics = torch.empty_like(statistics)
    programs = num_programs(T, new.device)
    partial = torch.empty(programs, 2, C, **wide)
    h, stride = unexpanded(streams)
    alpha, beta = parameters[3:] if projection is not None else (read, read)
    _backward[(programs,)](
        *(g_new.contiguous(), g_x.contiguous(), g_write.contiguous(), g_keep.contiguous()),
        *(h, pointer(output, h), pointer(write, read), pointer(keep, read), pointer(projection, read)),
        *(alpha, beta, pointer(norm_weight, read), new, read, statistics, norm_statistics),
        *(g_streams, *written, g_read, g_statistics, partial, T, form.eps, stride),
        **_constants(form, streams, output, projection),
    )
    g_projection = torch.empty(0, **wide)
    if projection is not None:
        # A product over all tokens, split over them by the library: W's partial sums do not fit beside a row.
        g_projection = g_statistics.view(-1, K + 2)[:, :K].t() @ new.view(-1, D).float()
    sums = partial.sum(0) if form.norm else torch.zeros(2, C, **wide)
    return [g_streams, *written, g_projection], g_read, sums
