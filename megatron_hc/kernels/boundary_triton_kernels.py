"""The Triton kernels of ``boundary_triton``.

Dims: T tokens, N streams, D width of one stream, R parts read and written, C = R D, K logits of a row: R of the read,
N of keep, then one of the write, whose [R, N] is zero off the diagonal where R is N (hyper- and frac-connections, one
scale alpha, one beta), or R of it, which fill it (virtual width, a matrix of scales alpha [N, R + N], beta [R, N]).
NP, RP, DP, KP: the next power of 2 (KP: of K + 2; DP at least 32). A thread has V columns of E at a time, P = E / V
threads a token; M tokens of a program whose threads have a number each.

Every stream is a vector of numbers over the threads of a program, so that what mixes streams is arithmetic within a
thread, and its weights are loaded as scalars. Streams pass the first cache (.cg), which is left to W.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_hc.kernels.triton_pieces import part_of_sum, rounded, tanh


@triton.jit
def scalars(base, COUNT: tl.constexpr, IS_HELD: tl.constexpr):  # type: ignore[no-untyped-def]
    """COUNT numbers that lie side by side, each in every thread, if registers have room for them."""
    found = ()
    if IS_HELD:
        for place in tl.static_range(COUNT):
            found = found + (tl.load(base + place),)
    return found


@triton.jit
def one_of(held, base, place: tl.constexpr, IS_HELD: tl.constexpr):  # type: ignore[no-untyped-def]
    """One of ``scalars``."""
    return held[place] if IS_HELD else tl.load(base + place)


@triton.jit
def vectors(base, stride, d, column, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns d of COUNT rows."""
    found = ()
    for row in tl.static_range(COUNT):
        found = found + (tl.load(base + row * stride + d, mask=column, other=0.0, cache_modifier=".cg"),)
    return found


@triton.jit
def settled(  # type: ignore[no-untyped-def]
    streams, parts, keeps, of_keep, writes, of_write, j: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    IS_HELD: tl.constexpr,
):  # fmt: skip
    """Stream j of H' in fp32: keep^T H + write^T Y, of one token's keep and write."""
    total = one_of(keeps, of_keep, j, IS_HELD) * streams[0].to(tl.float32)
    for s in tl.static_range(1, N):
        total += one_of(keeps, of_keep, s * N + j, IS_HELD) * streams[s].to(tl.float32)
    for q in tl.static_range(R):
        total += one_of(writes, of_write, q * N + j, IS_HELD) * parts[q].to(tl.float32)
    return total


@triton.jit
def forward(  # type: ignore[no-untyped-def]
    h, y, write, keep, w, row_sums, static_read, alpha, norm_weight, norm_bias, new, x, statistics, norm_statistics,
    eps, norm_eps, stream_stride,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, DP: tl.constexpr, E: tl.constexpr,
    V: tl.constexpr, IS_HELD: tl.constexpr, HAS_OUTPUT: tl.constexpr, IS_DYNAMIC: tl.constexpr,
    IS_CENTRED: tl.constexpr, NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MATRICES: tl.constexpr,
    IS_COMPILED: tl.constexpr,
):  # fmt: skip
    """One token: H', the statistics, x and the statistics of its norm. ``stream_stride``: see ``unexpanded``.

    First E columns at a time, of which each thread keeps its part of every sum over D; then x, from H' once more, which
    its multiprocessor has just written.
    """
    t = tl.program_id(0).to(tl.int64)
    P: tl.constexpr = E // V
    token = h + t * (D + (N - 1) * stream_stride)
    of_keep, of_write = keep, write
    if HAS_OUTPUT:
        of_keep += t * N * N
        of_write += t * R * N
    keeps = scalars(of_keep, N * N if HAS_OUTPUT else 0, IS_HELD)
    writes = scalars(of_write, R * N if HAS_OUTPUT else 0, IS_HELD)
    sums = ()
    squares = ()
    for _ in tl.static_range(N * K if IS_DYNAMIC else 0):
        sums = sums + (tl.zeros([P], tl.float32),)
    for _ in tl.static_range(N if IS_DYNAMIC else 0):
        squares = squares + (tl.zeros([P], tl.float32),)
    for start in range(0, D, E):
        d = start + tl.arange(0, E)
        column = d < D
        streams = vectors(token, stream_stride, d, column, N)
        parts = vectors(y + t * R * D, D, d, column, R if HAS_OUTPUT else 0)
        rows = ()
        for j in tl.static_range(N):
            stored = streams[j]
            if HAS_OUTPUT:
                total = settled(streams, parts, keeps, of_keep, writes, of_write, j, N, R, IS_HELD)
                stored = rounded(total, new.dtype.element_ty, IS_COMPILED)
            tl.store(new + (t * N + j) * D + d, stored, mask=column)
            rows = rows + (stored.to(tl.float32),)
        if IS_DYNAMIC:
            added = ()
            for a in tl.static_range(N):
                # Of centred rows: the sum here.
                added = added + (squares[a] + part_of_sum(rows[a] if IS_CENTRED else rows[a] * rows[a], P, V),)
            squares = added
            added = ()
            for b in tl.static_range(K):
                projection = tl.load(w + b * D + d, mask=column, other=0.0, eviction_policy="evict_last")
                for a in tl.static_range(N):
                    added = added + (sums[b * N + a] + part_of_sum(rows[a] * projection, P, V),)
            sums = added
    tl.debug_barrier()
    d = tl.arange(0, DP)
    column = d < D
    xs = ()
    for _ in tl.static_range(R):
        xs = xs + (tl.zeros([DP], tl.float32),)
    for j in tl.static_range(N):
        row = tl.load(new + (t * N + j) * D + d, mask=column, other=0.0, cache_modifier=".cg").to(tl.float32)
        if IS_DYNAMIC:
            of_row = statistics + (t * N + j) * (K + 2)
            mean = 0.0
            square = tl.sum(squares[j], 0) / D
            if IS_CENTRED:
                mean = square
                centred = tl.where(column, row - mean, 0.0)
                square = tl.sum(centred * centred, 0) / D
            tl.store(of_row + K, mean)
            tl.store(of_row + K + 1, square)
            inverse = tl.rsqrt(square + eps)
            for b in tl.static_range(R, K):
                tl.store(of_row + b, tl.sum(sums[b * N + j], 0))
        added = ()
        for q in tl.static_range(R):
            weight = tl.load(static_read + j * R + q)
            if IS_DYNAMIC:
                logit = tl.sum(sums[q * N + j], 0)
                tl.store(of_row + q, logit)
                if IS_CENTRED:
                    logit -= mean * tl.load(row_sums + q)
                scale = tl.load(alpha + j * (R + N) + q if HAS_MATRICES else alpha)
                weight += scale * tanh(logit * inverse)
            added = added + (xs[q] + weight * row,)
        xs = added
    mean_x = 0.0
    inverse_x = 1.0
    total = 0.0
    if NORM == 2:
        for q in tl.static_range(R):
            mean_x += tl.sum(xs[q], 0) / (R * D)
    if NORM > 0:
        for q in tl.static_range(R):
            centred = tl.where(column, xs[q] - mean_x, 0.0) if NORM == 2 else xs[q]
            total += tl.sum(centred * centred, 0)
        inverse_x = tl.rsqrt(total / (R * D) + norm_eps)
        tl.store(norm_statistics + 2 * t, mean_x)
        tl.store(norm_statistics + 2 * t + 1, inverse_x)
    for q in tl.static_range(R):
        value = xs[q]
        if NORM > 0:
            value = (value - mean_x) * inverse_x * tl.load(norm_weight + q * D + d, mask=column, other=0.0)
        if HAS_BIAS:
            value += tl.load(norm_bias + q * D + d, mask=column, other=0.0)
        tl.store(x + (t * R + q) * D + d, rounded(value, x.dtype.element_ty, IS_COMPILED), mask=column)


@triton.jit
def place_in_write(  # type: ignore[no-untyped-def]
    t, i, k, N: tl.constexpr, R: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """Where write [T, R, N] has what row i's logit k gives, k >= R + N."""
    if K > R + N + 1:
        place = (t * R + (k - R - N)) * N + i
    elif R == 1:
        place = t * N + i + 0 * k
    else:
        place = (t * R + i) * N + i + 0 * k
    return place


@triton.jit
def scales_of(  # type: ignore[no-untyped-def]
    alpha, beta, i, k, N: tl.constexpr, R: tl.constexpr, K: tl.constexpr, HAS_MATRICES: tl.constexpr
):  # fmt: skip
    """What row i's logit k is scaled with, after tanh."""
    if HAS_MATRICES:
        is_row = i < N
        scale = tl.load(alpha + i * (R + N) + k, mask=is_row & (k < R + N), other=0.0)
        scale += tl.load(beta + (k - R - N) * N + i, mask=is_row & (k >= R + N) & (k < K), other=0.0)
    else:
        scale = tl.where(k < R + N, tl.load(alpha), tl.load(beta))
    return scale


@triton.jit(do_not_specialize=["num_tokens"])
def weights(  # type: ignore[no-untyped-def]
    statistics, row_sums, static_read, static_keep, static_write, alpha, beta, read, write, keep, num_tokens, eps,
    N: tl.constexpr, R: tl.constexpr, K: tl.constexpr, NP: tl.constexpr, KP: tl.constexpr, M: tl.constexpr,
    IS_DYNAMIC: tl.constexpr, IS_CENTRED: tl.constexpr, HAS_MATRICES: tl.constexpr,
):  # fmt: skip
    """M tokens' weights, a number per thread; what is zero off ``write``'s diagonal is zero already."""
    i, k = tl.arange(0, NP)[None, :, None], tl.arange(0, KP)[None, None, :]
    t = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)[:, None, None]
    here = (t < num_tokens) & (i < N)
    is_read, is_keep, is_write = k < R, (k >= R) & (k < R + N), (k >= R + N) & (k < K)
    value = tl.load(static_read + i * R + k, mask=is_read & (i < N), other=0.0)
    value += tl.load(static_keep + i * N + (k - R), mask=is_keep & (i < N), other=0.0)
    value += tl.load(static_write + (k - R - N) * N + i, mask=is_write & (i < N), other=0.0)
    value += tl.zeros([M, NP, KP], tl.float32)
    if IS_DYNAMIC:
        of_row = statistics + (t * N + i) * (K + 2)
        z = tl.load(of_row + k, mask=here & (k < K), other=0.0)
        if IS_CENTRED:
            z -= tl.load(of_row + K, mask=here, other=0.0) * tl.load(row_sums + k, mask=k < K, other=0.0)
        inverse = tl.rsqrt(tl.load(of_row + (K + 1), mask=here, other=1.0) + eps)
        value += scales_of(alpha, beta, i, k, N, R, K, HAS_MATRICES) * tanh(z * inverse)
    tl.store(read + (t * N + i) * R + k, value, mask=here & is_read)
    tl.store(keep + (t * N + i) * N + (k - R), value, mask=here & is_keep)
    tl.store(write + place_in_write(t, i, k, N, R, K), value, mask=here & is_write)
