"""Many writes in one Triton kernel: the streams of a whole block of boundaries again, for its backward pass.

Dims: T tokens, N streams, D width of one stream, R parts written, DP the next power of 2, L boundaries.

With the weights of every write kept, some 20 numbers per token, nothing is summed over D: a program has a token's
streams in registers from the first boundary to the last, reads C numbers per boundary and writes N D. (Whole boundaries
one by one, as in arXiv 2512.24880, section 4.3.2, read as much as they write.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_hc.kernels.boundary_results import Written, unexpanded
from megatron_hc.kernels.boundary_triton_kernels import settled
from megatron_hc.kernels.triton_pieces import IS_INTERPRETED, rounded

MOST = 8  # boundaries of one kernel, whose code is written out for each


@triton.jit
def fold_all(  # type: ignore[no-untyped-def]
    h, outputs, writes, keeps, news, stream_stride,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, DP: tl.constexpr, L: tl.constexpr, IS_COMPILED: tl.constexpr,
):  # fmt: skip
    """One token; of ``outputs``, ``writes``, ``keeps`` and ``news`` L tensors each. Stride: see ``unexpanded``."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DP)
    column = d < D
    token = h + t * (D + (N - 1) * stream_stride)
    streams = ()
    for s in tl.static_range(N):
        streams = streams + (tl.load(token + s * stream_stride + d, mask=column, other=0.0, cache_modifier=".cg"),)
    for b in tl.static_range(L):
        parts = ()
        for q in tl.static_range(R):
            one = outputs[b] + (t * R + q) * D + d
            parts = parts + (tl.load(one, mask=column, other=0.0, cache_modifier=".cg"),)
        rows = ()
        for j in tl.static_range(N):
            total = settled(streams, parts, (), keeps[b] + t * N * N, (), writes[b] + t * R * N, j, N, R, False)
            stored = rounded(total, h.dtype.element_ty, IS_COMPILED)
            tl.store(news[b] + (t * N + j) * D + d, stored, mask=column)
            rows = rows + (stored,)
        streams = rows


def folds(streams: Tensor, written: Sequence[Written]) -> list[Tensor]:
    """H [T, N, D], (Y, write, keep) ... -> every H', the bits of ``boundary``'s."""
    found: list[Tensor] = []
    T, N, D = streams.shape
    DP = max(32, triton.next_power_of_2(D))
    num_warps = max(1, min(16, triton.next_power_of_2(N) * DP // 2048))
    for start in range(0, len(written), MOST):
        some = written[start : start + MOST]
        outputs, writes, keeps = (tuple(t.contiguous() for t in kind) for kind in zip(*some, strict=True))
        news = tuple(torch.empty(T, N, D, dtype=streams.dtype, device=streams.device) for _ in some)
        h, stride = unexpanded(found[-1] if found else streams)
        constants = {"N": N, "D": D, "R": outputs[0].shape[1], "DP": DP, "L": len(some)}
        fold_all[(T,)](
            h, outputs, writes, keeps, news, stride, **constants, IS_COMPILED=not IS_INTERPRETED, num_warps=num_warps
        )
        found.extend(news)
    return found
