"""A boundary over a list of streams, in operations that a compiler joins: what ``--compile`` takes on a CPU.

Dims: T tokens, N streams, D width of one stream, R parts read and written, K logits. Products of N x N numbers per
token are sums written out: a compiler then reads every stream once, which it cannot do through a batched product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hc.kernels.coefficients import Form, coefficients
from megatron_hc.kernels.norm import norm, promote


def boundary(
    form: Form,
    streams: Tensor,
    output: Tensor | None,
    write: Tensor | None,
    keep: Tensor | None,
    projection: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    parameters: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``kernels.boundary.boundary``, by autograd."""
    T, N, _ = streams.shape
    new = streams if output is None or write is None or keep is None else fold(streams, output, write, keep)
    rows = new.to(promote(streams.dtype))
    logits = None
    if projection is not None:
        flat = rows.flatten(1).unsqueeze(1) if form.is_joint else rows
        z = F.linear(flat, projection)
        if form.is_centred:
            var, mean = torch.var_mean(flat, dim=-1, keepdim=True, correction=0)
            z = z - mean * projection.sum(-1)
        else:
            var = flat.square().mean(-1, keepdim=True)
        logits = z * torch.rsqrt(var + form.eps)
    read, next_write, next_keep = (w.expand(T, -1, -1) for w in coefficients(form, logits, list(parameters)))
    parts = [_weighted(read[:, :, r], rows) for r in range(form.num_reads)]
    x = torch.cat(parts, dim=-1)
    if form.norm:
        x = norm(x, form.norm, norm_weight, norm_bias, form.norm_eps)
    return new, x.to(streams.dtype), next_write, next_keep


def fold(streams: Tensor, output: Tensor, write: Tensor, keep: Tensor) -> Tensor:
    """keep^T H + write^T Y, accumulated in the weights' dtype."""
    wide = write.dtype
    rows, parts = streams.to(wide), output.to(wide)
    new = [
        _weighted(keep[:, :, j], rows) + _weighted(write[:, :, j], parts) for j in range(streams.shape[1])
    ]
    return torch.stack(new, dim=1).to(streams.dtype)


def _weighted(weights: Tensor, rows: Tensor) -> Tensor:
    """[T, n] x [T, n, D] -> [T, D]"""
    total = weights[:, 0:1] * rows[:, 0]
    for i in range(1, rows.shape[1]):
        total = total + weights[:, i : i + 1] * rows[:, i]
    return total
