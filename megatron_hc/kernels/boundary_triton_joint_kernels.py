"""The Triton kernels of ``boundary_triton_joint``.

Dims: T tokens, N streams, D width of a stream, K = N^2 + 2 N logits, KP: the next power of 2; M tokens, E columns.

An N x N matrix of a token is a tuple of N^2 tensors [M], one token per thread.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_hc.kernels.boundary_triton_kernels import settled
from megatron_hc.kernels.triton_pieces import rounded


@triton.jit
def _split(x):  # type: ignore[no-untyped-def]
    """fp32 -> three numbers of bf16 whose sum it is."""
    high = x.to(tl.bfloat16)
    x -= high.to(tl.float32)
    middle = x.to(tl.bfloat16)
    return high, middle, (x - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def split_projection(w, result, count, B: tl.constexpr):  # type: ignore[no-untyped-def]
    """[count] in fp32 -> [3, count] in bf16."""
    at = tl.program_id(0) * B + tl.arange(0, B)
    high, middle, low = _split(tl.load(w + at, mask=at < count, other=0.0))
    tl.store(result + at, high, mask=at < count)
    tl.store(result + count + at, middle, mask=at < count)
    tl.store(result + 2 * count + at, low, mask=at < count)


@triton.jit
def fold(  # type: ignore[no-untyped-def]
    h, y, write, keep, new, statistics, stream_stride,
    N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, DP: tl.constexpr, HAS_OUTPUT: tl.constexpr,
    IS_DYNAMIC: tl.constexpr, IS_COMPILED: tl.constexpr,
):  # fmt: skip
    """One token: H', and in the last of its statistics [T, K + 2] the mean square."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DP)
    column = d < D
    token = h + t * (D + (N - 1) * stream_stride)
    streams = ()
    for s in tl.static_range(N):
        streams = streams + (tl.load(token + s * stream_stride + d, mask=column, other=0.0, cache_modifier=".cg"),)
    parts = ()
    if HAS_OUTPUT:
        parts = parts + (tl.load(y + t * D + d, mask=column, other=0.0, cache_modifier=".cg"),)
    square = tl.zeros([DP], tl.float32)
    for j in tl.static_range(N):
        stored = streams[j]
        if HAS_OUTPUT:
            total = settled(streams, parts, (), keep + t * N * N, (), write + t * N, j, N, 1, False)
            stored = rounded(total, new.dtype.element_ty, IS_COMPILED)
        tl.store(new + (t * N + j) * D + d, stored, mask=column)
        square += stored.to(tl.float32) * stored.to(tl.float32)
    if IS_DYNAMIC:
        tl.store(statistics + t * (K + 2) + (K + 1), tl.sum(square, 0) / (N * D))


@triton.jit(do_not_specialize=["num_tokens"])
def logits(  # type: ignore[no-untyped-def]
    rows, w, sums, num_tokens,
    WIDTH: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, E: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):  # fmt: skip
    """rows [T, WIDTH] times W's rows, of COLUMNS of WIDTH: ``sums`` [parts of WIDTH, T, KP]."""
    first = tl.program_id(0).to(tl.int64) * M
    m, k = tl.arange(0, M)[:, None], tl.arange(0, KP)[:, None]
    is_token = first + m < num_tokens
    rows += first * WIDTH
    z = tl.zeros([M, KP], tl.float32)
    for start in range(0, COLUMNS, E):
        d = tl.program_id(1) * COLUMNS + start + tl.arange(0, E)[None, :]
        left = tl.load(rows + m * WIDTH + d, mask=is_token & (d < WIDTH), other=0.0)
        inside = (k < K) & (d < WIDTH)
        if IS_SPLIT:
            for level in tl.static_range(3):
                of_level = w + (2 - level) * K * WIDTH + k * WIDTH + d
                z = tl.dot(left, tl.trans(tl.load(of_level, mask=inside, other=0.0)), z)
        else:
            right = tl.trans(tl.load(w + k * WIDTH + d, mask=inside, other=0.0))
            z = tl.dot(left.to(tl.float32), right, z, input_precision="tf32x3")
    column = tl.arange(0, KP)[None, :]
    into = sums + (tl.program_id(1) * num_tokens.to(tl.int64) + first) * KP + m * KP + column
    tl.store(into, z, mask=is_token & (column < K))


@triton.jit(do_not_specialize=["num_tokens"])
def with_product(  # type: ignore[no-untyped-def]
    g_new, g_z, w, result, num_tokens,
    WIDTH: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, M: tl.constexpr, E: tl.constexpr, STAGES: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):  # fmt: skip
    """The gradient of H' [T, WIDTH] and, added, that of the logits [T, K + 2] times W, in fp32.

    E columns, whose part of W stays, of every ``num_programs``-th M tokens.
    """
    m, k = tl.arange(0, M)[:, None], tl.arange(0, KP)
    d = tl.program_id(0) * E + tl.arange(0, E)[None, :]
    is_column = d < WIDTH
    inside = (k < K)[:, None] & is_column
    of_row = w + k[:, None] * WIDTH + d
    right = tl.load(of_row, mask=inside, other=0.0)
    if IS_SPLIT:
        middle_right = tl.load(of_row + K * WIDTH, mask=inside, other=0.0)
    for tile in tl.range(tl.program_id(1), tl.cdiv(num_tokens, M), tl.num_programs(1), num_stages=STAGES):
        first = tl.cast(tile, tl.int64) * M
        is_token = first + m < num_tokens
        of_logits = g_z + first * (K + 2) + m * (K + 2) + k[None, :]
        left = tl.load(of_logits, mask=is_token & (k < K)[None, :], other=0.0)
        at = first * WIDTH + m * WIDTH + d
        here = is_token & is_column
        total = tl.load(g_new + at, mask=here, other=0.0).to(tl.float32)
        if IS_SPLIT:
            high, middle, _ = _split(left)
            total = tl.dot(middle, right, total)
            total = tl.dot(high, middle_right, total)
            total = tl.dot(high, right, total)
        else:
            total = tl.dot(left, right, total, input_precision="tf32x3")
        tl.store(result + at, total, mask=here)


@triton.jit
def _first_iterate(matrix, N: tl.constexpr, FLOOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logits [N, N] as a tuple -> exp of them less the largest of their column, not below FLOOR."""
    tops = _largest(matrix, N)
    found = ()
    for a in tl.static_range(N):
        for b in tl.static_range(N):
            found = found + (tl.exp(tl.maximum(matrix[a * N + b] - tops[b], FLOOR)),)
    return found


@triton.jit
def _largest(matrix, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of every column."""
    found = ()
    for b in tl.static_range(N):
        top = matrix[b]
        for other in tl.static_range(1, N):
            top = tl.maximum(top, matrix[other * N + b])
        found = found + (top,)
    return found


@triton.jit
def _sums(matrix, IS_ROWS: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of every row, or of every column: a tuple of N."""
    found = ()
    for a in tl.static_range(N):
        total = matrix[a * N if IS_ROWS else a]
        for b in tl.static_range(1, N):
            total += matrix[a * N + b if IS_ROWS else b * N + a]
        found = found + (total,)
    return found


@triton.jit
def _scaled(  # type: ignore[no-untyped-def]
    matrix, sums, IS_ROWS: tl.constexpr, IS_PRODUCT: tl.constexpr, N: tl.constexpr
):
    """A matrix divided, or multiplied, by one number per row or per column."""
    found = ()
    for a in tl.static_range(N):
        for b in tl.static_range(N):
            one = sums[a] if IS_ROWS else sums[b]
            found = found + (matrix[a * N + b] * one if IS_PRODUCT else matrix[a * N + b] / one,)
    return found


@triton.jit
def _logit(  # type: ignore[no-untyped-def]
    statistics, alpha, bias, t, here, eps, k: tl.constexpr, N: tl.constexpr, K: tl.constexpr, IS_DYNAMIC: tl.constexpr
):  # fmt: skip
    """Of every token alpha z / rms + bias, z / rms and 1 / rms: logit k, and what it is made of."""
    value = tl.load(bias + k) + tl.zeros_like(eps)
    normed = value
    inverse = value
    if IS_DYNAMIC:
        of_row = statistics + t * (K + 2)
        inverse = tl.rsqrt(tl.load(of_row + (K + 1), mask=here, other=1.0) + eps)
        normed = tl.load(of_row + k, mask=here, other=0.0) * inverse
        value = tl.load(alpha + (0 if k < N else 1 if k < 2 * N else 2)) * normed + tl.load(bias + k)
    return value, normed, inverse


@triton.jit(do_not_specialize=["num_tokens"])
def weights(  # type: ignore[no-untyped-def]
    sums, statistics, alpha, bias, read, write, keep, num_tokens, eps,
    N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, M: tl.constexpr, ITERATIONS: tl.constexpr,
    FLOOR: tl.constexpr, IS_DYNAMIC: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A token per thread: the statistics from their parts, then the weights."""
    stride = num_tokens.to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    here = t < num_tokens
    wide_eps = tl.zeros([M], tl.float32) + eps
    if IS_DYNAMIC:
        of_row = statistics + t * (K + 2)
        for k in tl.static_range(K):
            total = tl.zeros([M], tl.float32)
            for part in tl.static_range(PARTS):
                total += tl.load(sums + (part * stride + t) * KP + k, mask=here, other=0.0)
            tl.store(of_row + k, total, mask=here)
        tl.store(of_row + K, tl.zeros([M], tl.float32), mask=here)
        # The same thread reads what it has written.
    matrix = ()
    for k in tl.static_range(K):
        logit, _, _ = _logit(statistics, alpha, bias, t, here, wide_eps, k, N, K, IS_DYNAMIC)
        if k < N:
            tl.store(read + t * N + k, tl.sigmoid(logit), mask=here)
        elif k < 2 * N:
            tl.store(write + t * N + (k - N), 2 * tl.sigmoid(logit), mask=here)
        else:
            matrix = matrix + (logit,)
    matrix = _first_iterate(matrix, N, FLOOR)
    for _ in range(ITERATIONS):
        matrix = _scaled(matrix, _sums(matrix, False, N), False, False, N)
        matrix = _scaled(matrix, _sums(matrix, True, N), True, False, N)
    for a in tl.static_range(N):
        for b in tl.static_range(N):
            # keep[old, new] is the transpose of H_res[new, old].
            tl.store(keep + t * N * N + (b * N + a), matrix[a * N + b], mask=here)


@triton.jit
def read_and_norm(  # type: ignore[no-untyped-def]
    new, read, norm_weight, norm_bias, x, norm_statistics, norm_eps,
    N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, NORM: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_COMPILED: tl.constexpr,
):  # fmt: skip
    """One token: norm(read^T H')."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DP)
    column = d < D
    value = tl.zeros([DP], tl.float32)
    for j in tl.static_range(N):
        row = tl.load(new + (t * N + j) * D + d, mask=column, other=0.0, cache_modifier=".cg").to(tl.float32)
        value += tl.load(read + t * N + j) * row
    if NORM > 0:
        mean = tl.sum(value, 0) / D if NORM == 2 else 0.0
        value = tl.where(column, value - mean, 0.0) if NORM == 2 else value
        inverse = tl.rsqrt(tl.sum(value * value, 0) / D + norm_eps)
        tl.store(norm_statistics + 2 * t, mean)
        tl.store(norm_statistics + 2 * t + 1, inverse)
        value = value * inverse * tl.load(norm_weight + d, mask=column, other=0.0)
        if HAS_BIAS:
            value += tl.load(norm_bias + d, mask=column, other=0.0)
    tl.store(x + t * D + d, rounded(value, x.dtype.element_ty, IS_COMPILED), mask=column)


@triton.jit(do_not_specialize=["num_tokens", "width"])
def backward_weights(  # type: ignore[no-untyped-def]
    g_read, g_write, g_keep, statistics, alpha, bias, g_z, sums, partial, num_tokens, eps, width,
    N: tl.constexpr, K: tl.constexpr, M: tl.constexpr, ITERATIONS: tl.constexpr,
    FLOOR: tl.constexpr, IS_DYNAMIC: tl.constexpr,
):  # fmt: skip
    """A token per thread. ``g_z`` [T, K + 2]: gradients of z, 0, and of the mean square times 2 / (N D).

    ``partial`` [programs, 2, K]: sums over tokens of the logits' gradients, and of these times z / rms. ``sums``
    [2 ITERATIONS N, T] is scratch: what the iterates were divided by, so that they are undone one by one.
    """
    t = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    here = t < num_tokens
    wide_eps = tl.zeros([M], tl.float32) + eps
    into = partial + tl.program_id(0) * 2 * K
    matrix = ()
    grad = ()
    along = tl.zeros([M], tl.float32)
    for k in tl.static_range(2 * N):
        logit, normed, inverse = _logit(statistics, alpha, bias, t, here, wide_eps, k, N, K, IS_DYNAMIC)
        half = tl.sigmoid(logit)
        if k < N:
            g = tl.load(g_read + t * N + k, mask=here, other=0.0) * half * (1 - half)
        else:
            g = tl.load(g_write + t * N + (k - N), mask=here, other=0.0) * 2 * half * (1 - half)
        along += _give(g, normed, inverse, alpha, g_z, into, t, here, k, N, K, IS_DYNAMIC)
    for k in tl.static_range(2 * N, K):
        logit, _, _ = _logit(statistics, alpha, bias, t, here, wide_eps, k, N, K, IS_DYNAMIC)
        matrix = matrix + (logit,)
    logits = matrix
    matrix = _first_iterate(matrix, N, FLOOR)
    at = sums + t
    stride = num_tokens.to(tl.int64)
    for step in range(ITERATIONS):
        totals = _sums(matrix, False, N)
        matrix = _scaled(matrix, totals, False, False, N)
        rows = _sums(matrix, True, N)
        matrix = _scaled(matrix, rows, True, False, N)
        for a in tl.static_range(N):
            tl.store(at + ((2 * step) * N + a) * stride, totals[a], mask=here)
            tl.store(at + ((2 * step + 1) * N + a) * stride, rows[a], mask=here)
    for a in tl.static_range(N):
        for b in tl.static_range(N):
            grad = grad + (tl.load(g_keep + t * N * N + (b * N + a), mask=here, other=0.0),)
    for back in range(ITERATIONS):
        step = ITERATIONS - 1 - back
        rows = ()
        totals = ()
        for a in tl.static_range(N):
            rows = rows + (tl.load(at + ((2 * step + 1) * N + a) * stride, mask=here, other=1.0),)
            totals = totals + (tl.load(at + ((2 * step) * N + a) * stride, mask=here, other=1.0),)
        grad = _undone(grad, matrix, rows, True, N)
        matrix = _scaled(matrix, rows, True, True, N)
        grad = _undone(grad, matrix, totals, False, N)
        matrix = _scaled(matrix, totals, False, True, N)
    tops = _largest(logits, N)
    for k in tl.static_range(2 * N, K):
        _, normed, inverse = _logit(statistics, alpha, bias, t, here, wide_eps, k, N, K, IS_DYNAMIC)
        g = tl.where(logits[k - 2 * N] - tops[(k - 2 * N) % N] > FLOOR, grad[k - 2 * N] * matrix[k - 2 * N], 0.0)
        along += _give(g, normed, inverse, alpha, g_z, into, t, here, k, N, K, IS_DYNAMIC)
    if IS_DYNAMIC:
        tl.store(g_z + t * (K + 2) + K, tl.zeros([M], tl.float32), mask=here)
        tl.store(g_z + t * (K + 2) + (K + 1), -along / width, mask=here)


@triton.jit
def _undone(grad, matrix, sums, IS_ROWS: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Through matrix = previous / its sums, one per row or per column: from the gradient of matrix to previous'."""
    products = ()
    for a in tl.static_range(N * N):
        products = products + (grad[a] * matrix[a],)
    through = _sums(products, IS_ROWS, N)
    found = ()
    for a in tl.static_range(N):
        for b in tl.static_range(N):
            less = grad[a * N + b] - through[a if IS_ROWS else b]
            found = found + (less / sums[a if IS_ROWS else b],)
    return found


@triton.jit
def _give(  # type: ignore[no-untyped-def]
    g, normed, inverse, alpha, g_z, into, t, here, k: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    IS_DYNAMIC: tl.constexpr,
):  # fmt: skip
    """Write what belongs to logit k; -> its part of what the mean square is given."""
    g = tl.where(here, g, 0.0)
    tl.store(into + k, tl.sum(g, 0))
    found = tl.zeros_like(g)
    if IS_DYNAMIC:
        tl.store(into + K + k, tl.sum(g * normed, 0))
        g = g * tl.load(alpha + (0 if k < N else 1 if k < 2 * N else 2))
        tl.store(g_z + t * (K + 2) + k, g * inverse, mask=here)
        found = g * normed * inverse * inverse
    return found


@triton.jit(do_not_specialize=["num_rows"])
def parameter_gradients(  # type: ignore[no-untyped-def]
    partial, g_bias, g_alpha, num_rows,
    N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, B: tl.constexpr, IS_DYNAMIC: tl.constexpr,
):  # fmt: skip
    """What ``backward_weights``' programs have summed, added up: gradients of the bias [K] and of alpha [3]."""
    k = tl.arange(0, KP)
    of_bias = tl.zeros([B, KP], tl.float32)
    of_scale = tl.zeros([B, KP], tl.float32)
    start = 0
    while start < num_rows:
        row = start + tl.arange(0, B)[:, None]
        here = (row < num_rows) & (k < K)[None, :]
        at = partial + row * 2 * K + k[None, :]
        of_bias += tl.load(at, mask=here, other=0.0)
        if IS_DYNAMIC:
            of_scale += tl.load(at + K, mask=here, other=0.0)
        start += B
    tl.store(g_bias + k, tl.sum(of_bias, 0), mask=k < K)
    if IS_DYNAMIC:
        of_scale = tl.sum(of_scale, 0)
        tl.store(g_alpha, tl.sum(tl.where(k < N, of_scale, 0.0), 0))
        tl.store(g_alpha + 1, tl.sum(tl.where((k >= N) & (k < 2 * N), of_scale, 0.0), 0))
        tl.store(g_alpha + 2, tl.sum(tl.where(k >= 2 * N, of_scale, 0.0), 0))
