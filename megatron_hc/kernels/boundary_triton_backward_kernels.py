"""The Triton kernels of ``boundary_triton``'s backward pass. Dims as in ``boundary_triton_kernels``."""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_hc.kernels.boundary_triton_kernels import one_of, place_in_write, scalars, scales_of, settled, vectors
from megatron_hc.kernels.triton_pieces import part_of_sum, rounded, tanh


@triton.jit(do_not_specialize=["num_tokens"])
def backward_read(  # type: ignore[no-untyped-def]
    g_x, new, norm_weight, read, norm_statistics, g_read, g_norm, partial, num_tokens,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, E: tl.constexpr, V: tl.constexpr, IS_HELD: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Every ``num_programs``-th token: gradient of read, what the norm takes off that of x, the norm's parameters'.

    With g = dx times the norm's weight, the gradient of x before the norm is (g - hat along - offset) / rms, where
    along = mean(g hat) and offset = mean(g), stored in ``g_norm`` [T, 2]. A sum over D of that and a stream of H' is
    made of the sums of g and the stream, and of hat and the stream. ``partial`` [programs, NORM, R, D]: of the norm's
    weight and of its bias, whose columns a thread keeps, E at a time.
    """
    P: tl.constexpr = E // V
    BLOCKS: tl.constexpr = (D + E - 1) // E
    of_weight = ()
    of_bias = ()
    for _ in tl.static_range(BLOCKS * R if NORM > 0 else 0):
        of_weight = of_weight + (tl.zeros([E], tl.float32),)
    for _ in tl.static_range(BLOCKS * R if NORM == 2 else 0):
        of_bias = of_bias + (tl.zeros([E], tl.float32),)
    t = tl.program_id(0).to(tl.int64)
    while t < num_tokens:
        mean = 0.0
        inverse = 1.0
        if NORM > 0:
            mean = tl.load(norm_statistics + 2 * t)
            inverse = tl.load(norm_statistics + 2 * t + 1)
        of_read = read + t * N * R
        reads = scalars(of_read, N * R if NORM > 0 else 0, IS_HELD)
        sums = ()  # of g and every stream; of hat and every stream; of g; of every stream
        for _ in tl.static_range(N * R + (N * R if NORM > 0 else 0) + (R + N if NORM == 2 else 0)):
            sums = sums + (tl.zeros([P], tl.float32),)
        weight_sums = ()
        bias_sums = ()
        for block in tl.static_range(BLOCKS):
            d = block * E + tl.arange(0, E)
            column = d < D
            rows = ()
            for j in tl.static_range(N):
                one = tl.load(new + (t * N + j) * D + d, mask=column, other=0.0, cache_modifier=".cg")
                rows = rows + (one.to(tl.float32),)
            scaled = ()
            hats = ()
            for q in tl.static_range(R):
                g = tl.load(g_x + (t * R + q) * D + d, mask=column, other=0.0, cache_modifier=".cg").to(tl.float32)
                if NORM > 0:
                    hat = one_of(reads, of_read, q, IS_HELD) * rows[0]
                    for j in tl.static_range(1, N):
                        hat += one_of(reads, of_read, j * R + q, IS_HELD) * rows[j]
                    hat = tl.where(column, hat - mean, 0.0) * inverse if NORM == 2 else hat * inverse
                    weight_sums = weight_sums + (of_weight[block * R + q] + g * hat,)
                    if NORM == 2:
                        bias_sums = bias_sums + (of_bias[block * R + q] + g,)
                    hats = hats + (hat,)
                    g *= tl.load(norm_weight + q * D + d, mask=column, other=0.0)
                scaled = scaled + (g,)
            added = ()
            for s in tl.static_range(N):
                for q in tl.static_range(R):
                    added = added + (sums[s * R + q] + part_of_sum(rows[s] * scaled[q], P, V),)
            for s in tl.static_range(N if NORM > 0 else 0):
                for q in tl.static_range(R):
                    added = added + (sums[(N + s) * R + q] + part_of_sum(rows[s] * hats[q], P, V),)
            for q in tl.static_range(R if NORM == 2 else 0):
                added = added + (sums[2 * N * R + q] + part_of_sum(scaled[q], P, V),)
            for s in tl.static_range(N if NORM == 2 else 0):
                added = added + (sums[2 * N * R + R + s] + part_of_sum(rows[s], P, V),)
            sums = added
        of_weight = weight_sums
        of_bias = bias_sums
        found = ()
        along = 0.0
        offset = 0.0
        for a in tl.static_range(N * R):
            found = found + (tl.sum(sums[a], 0),)
            if NORM > 0:
                along += one_of(reads, of_read, a, IS_HELD) * found[a]
        if NORM == 2:
            for q in tl.static_range(R):
                offset += tl.sum(sums[2 * N * R + q], 0)
            along -= mean * offset
            offset /= R * D
        if NORM > 0:
            # The sum of g hat, hat = (read^T H' - mean) inverse, from the sums over rows.
            along *= inverse / (R * D)
            tl.store(g_norm + 2 * t, along)
            tl.store(g_norm + 2 * t + 1, offset)
        for s in tl.static_range(N):
            total = tl.sum(sums[2 * N * R + R + s], 0) if NORM == 2 else 0.0
            for q in tl.static_range(R):
                g = found[s * R + q]
                if NORM > 0:
                    g = (g - along * tl.sum(sums[(N + s) * R + q], 0) - offset * total) * inverse
                tl.store(g_read + (t * N + s) * R + q, g)
        t += tl.num_programs(0)
    into = partial + tl.program_id(0) * NORM * R * D
    for block in tl.static_range(BLOCKS if NORM > 0 else 0):
        d = block * E + tl.arange(0, E)
        column = d < D
        for q in tl.static_range(R):
            tl.store(into + q * D + d, of_weight[block * R + q], mask=column)
            if NORM == 2:
                tl.store(into + (R + q) * D + d, of_bias[block * R + q], mask=column)


@triton.jit(do_not_specialize=["num_tokens"])
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
    of_static = tl.zeros([M, NP, KP], tl.float32)
    of_scale = tl.zeros([M, NP, KP], tl.float32)
    of_sums = tl.zeros([M, NP, KP], tl.float32)
    start = tl.program_id(0).to(tl.int64) * M
    while start < num_tokens:
        t = start + tl.arange(0, M)[:, None, None]
        here = (t < num_tokens) & (i < N)
        g = tl.load(g_read + (t * N + i) * R + k, mask=here & (k < R), other=0.0)
        g += tl.load(g_keep + (t * N + i) * N + (k - R), mask=here & (k >= R) & (k < R + N), other=0.0)
        g += tl.load(g_write + place_in_write(t, i, k, N, R, K), mask=here & (k >= R + N) & (k < K), other=0.0)
        of_static += g
        if IS_DYNAMIC:
            of_row = (t * N + i) * (K + 2)
            z = tl.load(statistics + of_row + k, mask=here & (k < K), other=0.0)
            inverse = tl.rsqrt(tl.load(statistics + of_row + (K + 1), mask=here, other=1.0) + eps)
            if IS_CENTRED:
                mean = tl.load(statistics + of_row + K, mask=here, other=0.0)
                sums = tl.load(row_sums + k, mask=k < K, other=0.0)
                z -= mean * sums
            th = tanh(z * inverse)
            of_scale += g * th
            of_z = g * scales_of(alpha, beta, i, k, N, R, K, HAS_MATRICES) * (1 - th * th) * inverse
            share = tl.sum(of_z * z, 2)[:, :, None] * inverse * inverse * (-1.0 / D)
            shift = tl.zeros([M, NP, 1], tl.float32)
            if IS_CENTRED:
                shift = -tl.sum(of_z * sums, 2)[:, :, None] / D - share * mean
                of_sums -= of_z * mean
            of_z = tl.where(k == K, shift, tl.where(k == K + 1, share, of_z))
            tl.store(g_z + of_row + k, of_z, mask=here & (k < K + 2))
        start += tl.num_programs(0) * M
    a, b = tl.arange(0, NP)[:, None], tl.arange(0, KP)[None, :]
    into = partial + tl.program_id(0) * 3 * N * K + a * K + b
    valid = (a < N) & (b < K)
    tl.store(into, tl.sum(of_static, 0), mask=valid)
    tl.store(into + N * K, tl.sum(of_scale, 0), mask=valid)
    tl.store(into + 2 * N * K, tl.sum(of_sums, 0), mask=valid)


@triton.jit(do_not_specialize=["num_rows"])
def parameter_gradients(  # type: ignore[no-untyped-def]
    partial, g_read, g_keep, g_write, g_alpha, g_beta, g_row_sums, num_rows,
    N: tl.constexpr, R: tl.constexpr, K: tl.constexpr, NP: tl.constexpr, KP: tl.constexpr, B: tl.constexpr,
    IS_DYNAMIC: tl.constexpr, IS_CENTRED: tl.constexpr, HAS_MATRICES: tl.constexpr,
):  # fmt: skip
    """What ``backward_weights``' programs have summed, added up, to each parameter's own gradient."""
    i, k = tl.arange(0, NP)[:, None], tl.arange(0, KP)[None, :]
    is_one = (i < N) & (k < K)
    of_static = tl.zeros([B, NP, KP], tl.float32)
    of_scale = tl.zeros([B, NP, KP], tl.float32)
    of_sums = tl.zeros([B, NP, KP], tl.float32)
    start = 0
    while start < num_rows:
        row = start + tl.arange(0, B)[:, None, None]
        at = partial + row * 3 * N * K + (i * K + k)[None, :, :]
        here = (row < num_rows) & is_one[None, :, :]
        of_static += tl.load(at, mask=here, other=0.0)
        if IS_DYNAMIC:
            of_scale += tl.load(at + N * K, mask=here, other=0.0)
        if IS_CENTRED:
            of_sums += tl.load(at + 2 * N * K, mask=here, other=0.0)
        start += B
    of_static, of_scale, of_sums = tl.sum(of_static, 0), tl.sum(of_scale, 0), tl.sum(of_sums, 0)
    is_write = is_one & (k >= R + N)
    is_other = is_one & (k < R + N)
    tl.store(g_read + i * R + k, of_static, mask=is_one & (k < R))
    tl.store(g_keep + i * N + (k - R), of_static, mask=is_other & (k >= R))
    tl.store(g_write + (k - R - N) * N + i, of_static, mask=is_write)
    if HAS_MATRICES and IS_DYNAMIC:
        tl.store(g_alpha + i * (R + N) + k, of_scale, mask=is_other)
        tl.store(g_beta + (k - R - N) * N + i, of_scale, mask=is_write)
    elif IS_DYNAMIC:
        tl.store(g_alpha, tl.sum(tl.sum(tl.where(is_other, of_scale, 0.0), 1), 0))
        tl.store(g_beta, tl.sum(tl.sum(tl.where(is_write, of_scale, 0.0), 1), 0))
    if IS_CENTRED:
        tl.store(g_row_sums + tl.arange(0, KP), tl.sum(of_sums, 0), mask=tl.arange(0, KP) < K)


@triton.jit
def backward_streams(  # type: ignore[no-untyped-def]
    g_new, g_x, h, y, write, keep, w, norm_weight, read, norm_statistics, g_norm, g_z, g_h, g_y, g_write, g_keep,
    stream_stride,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, E: tl.constexpr, V: tl.constexpr,
    IS_HELD: tl.constexpr, HAS_OUTPUT: tl.constexpr, IS_DYNAMIC: tl.constexpr,
    IS_CENTRED: tl.constexpr, NORM: tl.constexpr, IS_COMPILED: tl.constexpr, IS_JOINT: tl.constexpr,
):  # fmt: skip
    """One token, E columns at a time: gradients of H, Y, keep and write.

    What differs by token is a number that every thread has, and each thread has a part of every sum over D: threads
    exchange nothing before the last column. H' is not rounded here where it is a term of its own gradient only. Joint:
    ``g_new`` has all that the logits give, but for the mean square's part, the last of ``g_z`` [T, K + 2].
    """
    P: tl.constexpr = E // V
    J: tl.constexpr = 0 if IS_JOINT else K + 2  # from one row of logits to the next
    HAS_LOGITS: tl.constexpr = IS_DYNAMIC and not IS_JOINT
    t = tl.program_id(0).to(tl.int64)
    token, of_read, of_keep, of_write = h + t * (D + (N - 1) * stream_stride), read + t * N * R, keep, write
    of_z = g_z
    if HAS_OUTPUT:
        of_keep += t * N * N
        of_write += t * R * N
    if IS_DYNAMIC:
        of_z += t * (1 if IS_JOINT else N) * (K + 2)
    reads = scalars(of_read, N * R, IS_HELD)
    keeps = scalars(of_keep, N * N if HAS_OUTPUT else 0, IS_HELD)
    writes = scalars(of_write, R * N if HAS_OUTPUT else 0, IS_HELD)
    logits = scalars(of_z, N * (K + 2) if HAS_LOGITS else K + 2 if IS_DYNAMIC else 0, IS_HELD)
    if NORM > 0:
        mean = tl.load(norm_statistics + 2 * t)
        inverse = tl.load(norm_statistics + 2 * t + 1)
        along = tl.load(g_norm + 2 * t)
        offset = tl.load(g_norm + 2 * t + 1)
    sums = ()
    for _ in tl.static_range((N + R) * N if HAS_OUTPUT else 0):
        sums = sums + (tl.zeros([P], tl.float32),)
    for start in range(0, D, E):
        d = start + tl.arange(0, E)
        column = d < D
        streams = vectors(token, stream_stride, d, column, N)
        parts = vectors(y + t * R * D, D, d, column, R if HAS_OUTPUT else 0)
        dxs = ()
        for q in tl.static_range(R):
            g = tl.load(g_x + (t * R + q) * D + d, mask=column, other=0.0, cache_modifier=".cg")
            dxs = dxs + (g.to(tl.float32),)
        grads = vectors(g_new + t * N * D, D, d, column, N)
        rows = ()
        for j in tl.static_range(N):
            if HAS_OUTPUT:
                total = settled(streams, parts, keeps, of_keep, writes, of_write, j, N, R, IS_HELD)
            else:
                total = streams[j].to(tl.float32)
            rows = rows + (total,)
        if NORM > 0:
            raw = dxs
            dxs = ()
            for q in tl.static_range(R):
                hat = one_of(reads, of_read, q, IS_HELD) * rows[0]
                for j in tl.static_range(1, N):
                    hat += one_of(reads, of_read, j * R + q, IS_HELD) * rows[j]
                hat = (hat - mean if NORM == 2 else hat) * (inverse * along)
                g = raw[q] * tl.load(norm_weight + q * D + d, mask=column, other=0.0) - hat
                dxs = dxs + ((g - offset if NORM == 2 else g) * inverse,)
        totals = ()
        for j in tl.static_range(N):
            total = grads[j].to(tl.float32)
            for q in tl.static_range(R):
                total += one_of(reads, of_read, j * R + q, IS_HELD) * dxs[q]
            if IS_DYNAMIC:
                total += one_of(logits, of_z, j * J + K + 1, IS_HELD) * rows[j]
                if IS_CENTRED:
                    total += one_of(logits, of_z, j * J + K, IS_HELD)
            totals = totals + (total,)
        for b in tl.static_range(K if HAS_LOGITS else 0):
            projection = tl.load(w + b * D + d, mask=column, other=0.0, eviction_policy="evict_last")
            added = ()
            for j in tl.static_range(N):
                added = added + (totals[j] + one_of(logits, of_z, j * J + b, IS_HELD) * projection,)
            totals = added
        grads = ()
        for j in tl.static_range(N):
            # Rounded, as it is where a stage boundary lies between the write and the read.
            stored = rounded(totals[j], h.dtype.element_ty, IS_COMPILED)
            if not HAS_OUTPUT:
                tl.store(g_h + (t * N + j) * D + d, stored, mask=column)
            wide = stored.to(tl.float32)
            grads = grads + (tl.where(column, wide, 0.0) if NORM == 2 or IS_CENTRED else wide,)
        if HAS_OUTPUT:
            added = ()
            for s in tl.static_range(N):
                total = one_of(keeps, of_keep, s * N, IS_HELD) * grads[0]
                for j in tl.static_range(1, N):
                    total += one_of(keeps, of_keep, s * N + j, IS_HELD) * grads[j]
                tl.store(g_h + (t * N + s) * D + d, rounded(total, g_h.dtype.element_ty, IS_COMPILED), mask=column)
                for j in tl.static_range(N):
                    product = streams[s].to(tl.float32) * grads[j]
                    added = added + (sums[s * N + j] + part_of_sum(product, P, V),)
            for q in tl.static_range(R):
                total = one_of(writes, of_write, q * N, IS_HELD) * grads[0]
                for j in tl.static_range(1, N):
                    total += one_of(writes, of_write, q * N + j, IS_HELD) * grads[j]
                into = g_y + (t * R + q) * D + d
                tl.store(into, rounded(total, g_y.dtype.element_ty, IS_COMPILED), mask=column)
                for j in tl.static_range(N):
                    product = parts[q].to(tl.float32) * grads[j]
                    added = added + (sums[(N + q) * N + j] + part_of_sum(product, P, V),)
            sums = added
    if HAS_OUTPUT:
        for a in tl.static_range((N + R) * N):
            total = tl.sum(sums[a], 0)
            if a < N * N:
                tl.store(g_keep + t * N * N + a, total)
            else:
                tl.store(g_write + t * R * N + (a - N * N), total)
