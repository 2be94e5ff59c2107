"""The Triton kernels of ``boundary_triton``.

Dims: T tokens, N streams, D width of one stream, R parts read and written, C = R D, K logits of a row: R of the read,
N of keep, then one of the write, whose [R, N] is zero off the diagonal where R is N (hyper- and frac-connections, one
scale alpha, one beta), or R of it, which fill it (virtual width, a matrix of scales alpha [N, R + N], beta [R, N]).
NP, RP, DP, KP: the next power of 2 (KP: of K + 2). V numbers lie side by side in one thread, E columns in a program.

Every stream is a vector of numbers over the threads of a program, so that what mixes streams is arithmetic within a
thread, and its weights are loaded as scalars. Streams pass the first cache (.cg), which is left to W.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_hc.kernels.triton_pieces import part_of_sum, pick, rounded, sums_of, tanh


@triton.jit
def settled(  # type: ignore[no-untyped-def]
    streams, parts, keep, write, t, j: tl.constexpr, N: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """Stream j of H' in fp32: keep^T H + write^T Y."""
    total = tl.load(keep + t * N * N + j) * streams[0].to(tl.float32)
    for s in tl.static_range(1, N):
        total += tl.load(keep + (t * N + s) * N + j) * streams[s].to(tl.float32)
    for q in tl.static_range(R):
        total += tl.load(write + (t * R + q) * N + j) * parts[q].to(tl.float32)
    return total


@triton.jit
def forward(  # type: ignore[no-untyped-def]
    h, y, write, keep, w, row_sums, static_read, alpha, norm_weight, norm_bias, new, x, statistics, norm_statistics,
    eps, norm_eps, stream_stride,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, NP: tl.constexpr, DP: tl.constexpr,
    KP: tl.constexpr, V: tl.constexpr, HAS_OUTPUT: tl.constexpr, IS_DYNAMIC: tl.constexpr, IS_CENTRED: tl.constexpr,
    NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MATRICES: tl.constexpr, IS_COMPILED: tl.constexpr,
):  # fmt: skip
    """One token: H', the statistics, x and the statistics of its norm. ``stream_stride``: see ``unexpanded``.

    Mean and mean square are columns of z where KP has room for them, and else stand by themselves.
    """
    t = tl.program_id(0).to(tl.int64)
    P: tl.constexpr = DP // V
    HAS_ROOM: tl.constexpr = KP >= K + 2
    d = tl.arange(0, DP)
    column = d < D
    token = h + t * (D + (N - 1) * stream_stride)
    streams = ()
    for s in tl.static_range(N):
        streams = streams + (tl.load(token + s * stream_stride + d, mask=column, other=0.0, cache_modifier=".cg"),)
    rows = ()
    if HAS_OUTPUT:
        parts = ()
        for q in tl.static_range(R):
            parts = parts + (tl.load(y + (t * R + q) * D + d, mask=column, other=0.0, cache_modifier=".cg"),)
        for j in tl.static_range(N):
            total = settled(streams, parts, keep, write, t, j, N, R)
            stored = rounded(total, new.dtype.element_ty, IS_COMPILED)
            tl.store(new + (t * N + j) * D + d, stored, mask=column)
            rows = rows + (stored.to(tl.float32),)
    else:
        for j in tl.static_range(N):
            tl.store(new + (t * N + j) * D + d, streams[j], mask=column)
            rows = rows + (streams[j].to(tl.float32),)
    i, k = tl.arange(0, NP)[:, None], tl.arange(0, KP)[None, :]
    row = i < N
    of_row = statistics + (t * N + i) * (K + 2) + k
    if IS_DYNAMIC:
        zero = tl.zeros([P], tl.float32)
        means = ()
        for j in tl.static_range(N):
            means = means + ((tl.sum(rows[j], 0) / D if IS_CENTRED else 0.0),)
        projection = ()
        for b in tl.static_range(K):
            one = w + b * D + d
            projection = projection + (tl.load(one, mask=column, other=0.0, eviction_policy="evict_last"),)
        sums = ()
        for a in tl.static_range(NP):
            for b in tl.static_range(KP):
                if a < N and b < K:
                    sums = sums + (part_of_sum(rows[a] * projection[b], P, V),)
                elif a < N and b == K + 1:
                    centred = tl.where(column, rows[a] - means[a], 0.0) if IS_CENTRED else rows[a]
                    sums = sums + (part_of_sum(centred * centred, P, V),)
                else:
                    sums = sums + (zero,)
        z = tl.reshape(sums_of(sums, NP * KP, P), [NP, KP])
        if HAS_ROOM:
            z = tl.where(k == K + 1, z / D, z)
            for j in tl.static_range(N):
                z = tl.where((i == j) & (k == K), means[j], z)
        else:
            squares = ()
            for a in tl.static_range(NP):
                if a < N:
                    centred = tl.where(column, rows[a] - means[a], 0.0) if IS_CENTRED else rows[a]
                    squares = squares + (part_of_sum(centred * centred, P, V),)
                    tl.store(statistics + (t * N + a) * (K + 2) + K, means[a])
                else:
                    squares = squares + (zero,)
            square = tl.reshape(sums_of(squares, NP, P) / D, [NP, 1])
            tl.store(statistics + (t * N + i) * (K + 2) + (K + 1), square, mask=row)
        tl.store(of_row, z, mask=row & (k < (K + 2 if HAS_ROOM else K)))
    xs = ()
    total = 0.0
    for q in tl.static_range(R):
        value = tl.zeros([DP], tl.float32)
        for j in tl.static_range(N):
            weight = tl.load(static_read + j * R + q)
            if IS_DYNAMIC:
                logit = pick(z, i, k, j, q)
                if IS_CENTRED:
                    logit -= means[j] * tl.load(row_sums + q)
                scale = tl.load(alpha + j * (R + N) + q if HAS_MATRICES else alpha)
                var = pick(z, i, k, j, K + 1) if HAS_ROOM else pick(square, i, 0 * i, j, 0)
                weight += scale * tanh(logit * tl.rsqrt(var + eps))
            value += weight * rows[j]
        xs = xs + (value,)
    mean_x = 0.0
    inverse = 1.0
    if NORM == 2:
        for q in tl.static_range(R):
            mean_x += tl.sum(xs[q], 0) / (R * D)
    if NORM > 0:
        for q in tl.static_range(R):
            centred = tl.where(column, xs[q] - mean_x, 0.0) if NORM == 2 else xs[q]
            total += tl.sum(centred * centred, 0)
        inverse = tl.rsqrt(total / (R * D) + norm_eps)
        tl.store(norm_statistics + 2 * t, mean_x)
        tl.store(norm_statistics + 2 * t + 1, inverse)
    for q in tl.static_range(R):
        value = xs[q]
        if NORM > 0:
            value = (value - mean_x) * inverse * tl.load(norm_weight + q * D + d, mask=column, other=0.0)
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


@triton.jit
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


@triton.jit
def backward_read(  # type: ignore[no-untyped-def]
    g_x, new, norm_weight, read, norm_statistics, g_read, g_norm,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, NP: tl.constexpr, RP: tl.constexpr, DP: tl.constexpr,
    V: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One token: gradient of the read weights, and what its norm takes off the gradient of x.

    With g = dx times the norm's weight, the gradient of x before the norm is (g - hat along - offset) / rms, where
    along = mean(g hat) and offset = mean(g), stored in ``g_norm`` [T, 2]. A sum over D of that and a stream of H' is
    made of the sums of g and the stream, and of hat and the stream.
    """
    t = tl.program_id(0).to(tl.int64)
    P: tl.constexpr = DP // V
    C: tl.constexpr = R * D
    d = tl.arange(0, DP)
    column = d < D
    rows = ()
    for j in tl.static_range(N):
        one = tl.load(new + (t * N + j) * D + d, mask=column, other=0.0, cache_modifier=".cg")
        rows = rows + (one.to(tl.float32),)
    hats = ()
    scaled = ()
    sums = ()
    inverse = 1.0
    if NORM > 0:
        mean = tl.load(norm_statistics + 2 * t)
        inverse = tl.load(norm_statistics + 2 * t + 1)
    for q in tl.static_range(R):
        g = tl.load(g_x + (t * R + q) * D + d, mask=column, other=0.0, cache_modifier=".cg").to(tl.float32)
        if NORM > 0:
            hat = hat_of(rows, read, t, q, column, mean, inverse, N, R, NORM)
            g *= tl.load(norm_weight + q * D + d, mask=column, other=0.0)
            hats = hats + (hat,)
        scaled = scaled + (g,)
    for s in tl.static_range(NP):
        for q in tl.static_range(RP):
            sums = sums + (part_of_sum(rows[s] * scaled[q], P, V) if s < N and q < R else tl.zeros([P], tl.float32),)
    if NORM == 0:
        found = tl.reshape(sums_of(sums, NP * RP, P), [NP, RP])
    else:
        for s in tl.static_range(NP):
            for q in tl.static_range(RP):
                sums = sums + (part_of_sum(rows[s] * hats[q], P, V) if s < N and q < R else tl.zeros([P], tl.float32),)
        both = sums_of(sums, 2 * NP * RP, P)
        a, r = tl.arange(0, 2 * NP)[:, None], tl.arange(0, RP)[None, :]
        i = tl.arange(0, NP)[:, None]
        square = tl.reshape(both, [2 * NP, RP])
        along = 0.0
        offset = 0.0
        for q in tl.static_range(R):
            for s in tl.static_range(N):
                along += tl.load(read + (t * N + s) * R + q) * pick(square, a, r, s, q)
            if NORM == 2:
                offset += tl.sum(scaled[q], 0) / C
        # The sum of g hat, hat = (read^T H' - mean) inverse, from the sums over rows.
        along = (along - mean * offset * C) * inverse / C if NORM == 2 else along * inverse / C
        found = tl.zeros([NP, RP], tl.float32)
        for s in tl.static_range(N):
            total = tl.sum(rows[s], 0) if NORM == 2 else 0.0
            for q in tl.static_range(R):
                g = pick(square, a, r, s, q) - along * pick(square, a, r, NP + s, q) - offset * total
                found = tl.where((i == s) & (r == q), g * inverse, found)
        tl.store(g_norm + 2 * t, along)
        tl.store(g_norm + 2 * t + 1, offset)
    i, r = tl.arange(0, NP)[:, None], tl.arange(0, RP)[None, :]
    tl.store(g_read + (t * N + i) * R + r, found, mask=(i < N) & (r < R))


@triton.jit
def hat_of(  # type: ignore[no-untyped-def]
    rows, read, t, q: tl.constexpr, column, mean, inverse, N: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr
):  # fmt: skip
    """Part q of x before the norm's weight."""
    value = tl.load(read + t * N * R + q) * rows[0]
    for j in tl.static_range(1, N):
        value += tl.load(read + (t * N + j) * R + q) * rows[j]
    return tl.where(column, (value - mean) * inverse, 0.0) if NORM == 2 else value * inverse


@triton.jit
def backward_weights(  # type: ignore[no-untyped-def]
    g_read, g_keep, g_write, statistics, row_sums, alpha, beta, g_z, partial, num_tokens, eps,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, NP: tl.constexpr, KP: tl.constexpr,
    M: tl.constexpr, IS_DYNAMIC: tl.constexpr, IS_CENTRED: tl.constexpr, HAS_MATRICES: tl.constexpr,
):  # fmt: skip
    """Through tanh and the norm in front of it, a number per thread.

    ``g_z`` [T, N, K + 2]: the gradients of z, what H' is given of the mean, and, times H', of the mean square.
    ``partial`` [programs, 3, N, K]: sums over tokens of the gradients of the static weights, of these times tanh, and
    of the gradients of W's row sums.
    """
    i, k = tl.arange(0, NP)[None, :, None], tl.arange(0, KP)[None, None, :]
    of_static = tl.zeros([NP, KP], tl.float32)
    of_scale = tl.zeros([NP, KP], tl.float32)
    of_sums = tl.zeros([NP, KP], tl.float32)
    start = tl.program_id(0).to(tl.int64) * M
    while start < num_tokens:
        t = start + tl.arange(0, M)[:, None, None]
        here = (t < num_tokens) & (i < N)
        g = tl.load(g_read + (t * N + i) * R + k, mask=here & (k < R), other=0.0)
        g += tl.load(g_keep + (t * N + i) * N + (k - R), mask=here & (k >= R) & (k < R + N), other=0.0)
        g += tl.load(g_write + place_in_write(t, i, k, N, R, K), mask=here & (k >= R + N) & (k < K), other=0.0)
        of_static += tl.sum(g, 0)
        if IS_DYNAMIC:
            of_row = (t * N + i) * (K + 2)
            z = tl.load(statistics + of_row + k, mask=here & (k < K), other=0.0)
            inverse = tl.rsqrt(tl.load(statistics + of_row + (K + 1), mask=here, other=1.0) + eps)
            if IS_CENTRED:
                mean = tl.load(statistics + of_row + K, mask=here, other=0.0)
                sums = tl.load(row_sums + k, mask=k < K, other=0.0)
                z -= mean * sums
            th = tanh(z * inverse)
            of_scale += tl.sum(g * th, 0)
            of_z = g * scales_of(alpha, beta, i, k, N, R, K, HAS_MATRICES) * (1 - th * th) * inverse
            share = tl.sum(of_z * z, 2)[:, :, None] * inverse * inverse * (-1.0 / D)
            shift = tl.zeros([M, NP, 1], tl.float32)
            if IS_CENTRED:
                shift = -tl.sum(of_z * sums, 2)[:, :, None] / D - share * mean
                of_sums -= tl.sum(of_z * mean, 0)
            of_z = tl.where(k == K, shift, tl.where(k == K + 1, share, of_z))
            tl.store(g_z + of_row + k, of_z, mask=here & (k < K + 2))
        start += tl.num_programs(0) * M
    a, b = tl.arange(0, NP)[:, None], tl.arange(0, KP)[None, :]
    into = partial + tl.program_id(0) * 3 * N * K + a * K + b
    valid = (a < N) & (b < K)
    tl.store(into, of_static, mask=valid)
    tl.store(into + N * K, of_scale, mask=valid)
    tl.store(into + 2 * N * K, of_sums, mask=valid)


@triton.jit
def backward_streams(  # type: ignore[no-untyped-def]
    g_new, g_x, h, y, write, keep, w, norm_weight, read, norm_statistics, g_norm, g_z,
    g_h, g_y, written, partial, num_tokens, stream_stride,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, NP: tl.constexpr, RP: tl.constexpr,
    E: tl.constexpr, V: tl.constexpr, HAS_OUTPUT: tl.constexpr, IS_DYNAMIC: tl.constexpr, IS_CENTRED: tl.constexpr,
    NORM: tl.constexpr, IS_COMPILED: tl.constexpr, IS_JOINT: tl.constexpr,
):  # fmt: skip
    """Every ``num_programs``-th token, E columns of D: gradients of H and Y, and these columns' part of all sums.

    ``written`` [T, blocks of E, N + R, N]: parts of the gradients of keep and write. ``partial`` [programs over tokens,
    K + NORM R, D]: of W, of the norm's weight and of its bias. W's columns stay in registers. Joint: ``g_new`` has all
    that the logits give, but for the mean square's part, the last of ``g_z`` [T, K + 2].
    """
    P: tl.constexpr = E // V
    d = tl.program_id(0) * E + tl.arange(0, E)
    column = d < D
    projection = ()
    of_projection = ()
    if IS_DYNAMIC and not IS_JOINT:
        for b in tl.static_range(K):
            projection = projection + (tl.load(w + b * D + d, mask=column, other=0.0),)
            of_projection = of_projection + (tl.zeros([E], tl.float32),)
    norms = ()
    of_weight = ()
    of_bias = ()
    if NORM > 0:
        for q in tl.static_range(R):
            norms = norms + (tl.load(norm_weight + q * D + d, mask=column, other=0.0),)
            of_weight = of_weight + (tl.zeros([E], tl.float32),)
            if NORM == 2:
                of_bias = of_bias + (tl.zeros([E], tl.float32),)
    old, to = tl.arange(0, 2 * NP)[:, None], tl.arange(0, NP)[None, :]
    t = tl.program_id(1).to(tl.int64)
    while t < num_tokens:
        token = h + t * (D + (N - 1) * stream_stride)
        streams = ()
        for s in tl.static_range(N):
            streams = streams + (tl.load(token + s * stream_stride + d, mask=column, other=0.0),)
        parts = ()
        if HAS_OUTPUT:
            for q in tl.static_range(R):
                parts = parts + (tl.load(y + (t * R + q) * D + d, mask=column, other=0.0),)
        dxs = ()
        for q in tl.static_range(R):
            dxs = dxs + (tl.load(g_x + (t * R + q) * D + d, mask=column, other=0.0).to(tl.float32),)
        loaded = ()
        for j in tl.static_range(N):
            loaded = loaded + (tl.load(g_new + (t * N + j) * D + d, mask=column, other=0.0),)
        rows = ()
        for j in tl.static_range(N):
            if HAS_OUTPUT:
                total = settled(streams, parts, keep, write, t, j, N, R)
                rows = rows + (rounded(total, h.dtype.element_ty, IS_COMPILED).to(tl.float32),)
            else:
                rows = rows + (streams[j].to(tl.float32),)
        if NORM > 0:
            mean = tl.load(norm_statistics + 2 * t)
            inverse = tl.load(norm_statistics + 2 * t + 1)
            along = tl.load(g_norm + 2 * t)
            offset = tl.load(g_norm + 2 * t + 1)
            raw = dxs
            dxs = ()
            weight_sums = ()
            bias_sums = ()
            for q in tl.static_range(R):
                hat = hat_of(rows, read, t, q, column, mean, inverse, N, R, NORM)
                weight_sums = weight_sums + (of_weight[q] + raw[q] * hat,)
                g = raw[q] * norms[q] - hat * along
                if NORM == 2:
                    bias_sums = bias_sums + (of_bias[q] + raw[q],)
                    g -= offset
                dxs = dxs + (g * inverse,)
            of_weight = weight_sums
            of_bias = bias_sums
        grads = ()
        for j in tl.static_range(N):
            grad = loaded[j].to(tl.float32)
            for q in tl.static_range(R):
                grad += tl.load(read + (t * N + j) * R + q) * dxs[q]
            if IS_JOINT and IS_DYNAMIC:
                grad += tl.load(g_z + t * (K + 2) + (K + 1)) * rows[j]
            elif IS_DYNAMIC:
                of_row = g_z + (t * N + j) * (K + 2)
                grad += tl.load(of_row + (K + 1)) * rows[j]
                if IS_CENTRED:
                    grad += tl.load(of_row + K)
                projection_sums = ()
                for b in tl.static_range(K):
                    of_z = tl.load(of_row + b)
                    grad += of_z * projection[b]
                    projection_sums = projection_sums + (of_projection[b] + of_z * rows[j],)
                of_projection = projection_sums
            # Rounded, as it is where a stage boundary lies between the write and the read.
            stored = rounded(grad, h.dtype.element_ty, IS_COMPILED)
            if not HAS_OUTPUT:
                tl.store(g_h + (t * N + j) * D + d, stored, mask=column)
            grads = grads + (
                tl.where(column, stored.to(tl.float32), 0.0) if NORM == 2 or IS_CENTRED else stored.to(tl.float32),
            )
        if HAS_OUTPUT:
            sums = ()
            for s in tl.static_range(2 * NP):
                if s < N:
                    total = tl.load(keep + (t * N + s) * N) * grads[0]
                    for j in tl.static_range(1, N):
                        total += tl.load(keep + (t * N + s) * N + j) * grads[j]
                    tl.store(g_h + (t * N + s) * D + d, rounded(total, g_h.dtype.element_ty, IS_COMPILED), mask=column)
                if s >= NP and s < NP + R:
                    of_part = write + (t * R + s - NP) * N
                    total = tl.load(of_part) * grads[0]
                    for j in tl.static_range(1, N):
                        total += tl.load(of_part + j) * grads[j]
                    one = g_y + (t * R + s - NP) * D + d
                    tl.store(one, rounded(total, g_y.dtype.element_ty, IS_COMPILED), mask=column)
                for j in tl.static_range(NP):
                    if s < N and j < N:
                        sums = sums + (part_of_sum(streams[s].to(tl.float32) * grads[j], P, V),)
                    elif s >= NP and s < NP + R and j < N:
                        sums = sums + (part_of_sum(parts[s - NP].to(tl.float32) * grads[j], P, V),)
                    else:
                        sums = sums + (tl.zeros([P], tl.float32),)
            found = tl.reshape(sums_of(sums, 2 * NP * NP, P), [2 * NP, NP])
            of_token = written + (t * tl.num_programs(0) + tl.program_id(0)) * (N + R) * N + to
            tl.store(of_token + old * N, found, mask=(old < N) & (to < N))
            tl.store(of_token + (old - NP + N) * N, found, mask=(old >= NP) & (old < NP + R) & (to < N))
        t += tl.num_programs(1)
    into = partial + tl.program_id(1) * ((K if IS_DYNAMIC and not IS_JOINT else 0) + NORM * R) * D + d
    if IS_DYNAMIC and not IS_JOINT:
        for b in tl.static_range(K):
            tl.store(into, of_projection[b], mask=column)
            into += D
    if NORM > 0:
        for q in tl.static_range(R):
            tl.store(into, of_weight[q], mask=column)
            into += D
        if NORM == 2:
            for q in tl.static_range(R):
                tl.store(into, of_bias[q], mask=column)
                into += D


@triton.jit
def sum_of_blocks(  # type: ignore[no-untyped-def]
    written, g_write, g_keep, num_tokens,
    N: tl.constexpr, R: tl.constexpr, AP: tl.constexpr, NP: tl.constexpr, M: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """[T, blocks, N + R, N] -> gradients of keep [T, N, N] and write [T, R, N]."""
    t = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)[:, None, None]
    a, b = tl.arange(0, AP)[None, :, None], tl.arange(0, NP)[None, None, :]
    here = (t < num_tokens) & (a < N + R) & (b < N)
    total = tl.zeros([M, AP, NP], tl.float32)
    for block in range(BLOCKS):
        total += tl.load(written + ((t * BLOCKS + block) * (N + R) + a) * N + b, mask=here, other=0.0)
    tl.store(g_keep + (t * N + a) * N + b, total, mask=here & (a < N))
    tl.store(g_write + (t * R + a - N) * N + b, total, mask=here & (a >= N))
