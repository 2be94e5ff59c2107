"""The large parts of a boundary in plain torch, a block of tokens at a time so that a block stays in cache.

Dims: T tokens, N streams, D width of one stream, R parts read and written, C = R D, K logits, rows: N, or 1 (joint).

``boundary.py`` has the formulas and calls these; the C++ operations have the same signatures and meaning. "wide" is the
dtype of sums and of everything small: at least fp32. Results are rounded to the streams' dtype once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hc.kernels.boundary_results import Written, empty_gradients
from megatron_hc.kernels.coefficients import Form
from megatron_hc.kernels.norm import promote
from megatron_hc.kernels.row_blocks import row_blocks

BLOCK_ELEMENTS = 1 << 19  # numbers of H' that a thread has in flight: 2 MiB in fp32; half as many cost more in calls


def blocks(streams: Tensor) -> list[slice]:
    """Runs of tokens of [T, N, D] streams."""
    return row_blocks(streams, BLOCK_ELEMENTS)


def _longest(parts: Sequence[slice]) -> int:
    return max((part.stop - part.start for part in parts), default=0)


def enter(
    form: Form,
    streams: Tensor,
    output: Tensor | None,
    write: Tensor | None,
    keep: Tensor | None,
    projection: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """H [T, N, D], Y [T, R, D], write [T, R, N], keep [T, N, N], W [K, D or N D] -> H', statistics [T, rows, K + 2].

    Statistics of a row h of H': W h, mean (0 with RMSNorm), variance (mean square with RMSNorm); [0] without W.
    Without Y, H' is a copy of H.
    """
    T, N, D = streams.shape
    wide = promote(streams.dtype)
    new = torch.empty(T, N, D, dtype=streams.dtype, device=streams.device)
    statistics = torch.empty(0, dtype=wide, device=streams.device)
    if projection is not None:
        K, width = projection.shape
        statistics = torch.empty(T, N * D // width, K + 2, dtype=wide, device=streams.device)
    for part in blocks(streams):
        if output is None or write is None or keep is None:
            new[part] = streams[part]
        else:
            _fold_into(new[part], streams[part], output[part], write[part], keep[part])
        if projection is None:
            continue
        rows, found = new[part].view(-1, width).to(wide), statistics[part].view(-1, K + 2)
        found[:, :K] = F.linear(rows, projection)
        if form.is_centred:
            found[:, K + 1], found[:, K] = torch.var_mean(rows, dim=-1, correction=0)
        else:
            norm = torch.linalg.vector_norm(rows, dim=-1)
            found[:, K + 1], found[:, K] = norm * norm / width, 0
    return new, statistics


def _fold_into(new: Tensor, streams: Tensor, output: Tensor, write: Tensor, keep: Tensor) -> None:
    """keep^T H + write^T Y, accumulated in the weights' dtype, rounded once."""
    wide = write.dtype
    total = new if new.dtype == wide else torch.empty(new.shape, dtype=wide, device=new.device)
    # An outer product is faster as a broadcast than as a matrix product with a sum of one term.
    outer = torch.mul if output.shape[1] == 1 else torch.bmm
    outer(write.transpose(1, 2), output.to(wide), out=total)
    total.baddbmm_(keep.transpose(1, 2), streams.to(wide))
    if total is not new:
        new.copy_(total)


def leave(
    form: Form, new: Tensor, read: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """H', read [T, N, R], weight and bias [C] of the norm -> norm(read^T H') [T, C], its mean and 1 / rms [T, 2]."""
    (T, _, D), R, wide = new.shape, form.num_reads, read.dtype
    x = torch.empty(T, R * D, dtype=new.dtype, device=new.device)
    found = torch.empty(T if form.norm else 0, 2, dtype=wide, device=new.device)
    parts = blocks(new)
    scratch = x if x.dtype == wide else torch.empty(_longest(parts), R * D, dtype=wide, device=new.device)
    for part in parts:
        total = x[part] if scratch is x else scratch[: part.stop - part.start]
        _read_into(total.view(-1, R, D), new[part].to(wide), read[part])
        if form.norm:
            _norm_in_place(form, total, found[part], weight, bias)
        if scratch is not x:
            x[part] = total
    return x, found


def _read_into(total: Tensor, rows: Tensor, read: Tensor) -> None:
    """H' [t, N, D] and read [t, N, R], both in wide -> read^T H' [t, R, D]."""
    if read.shape[2] > 1:
        torch.bmm(read.transpose(1, 2), rows, out=total)
        return
    x = total[:, 0]
    torch.mul(rows[:, 0], read[:, 0], out=x)
    for i in range(1, rows.shape[1]):
        x.addcmul_(rows[:, i], read[:, i])


def _norm_in_place(form: Form, x: Tensor, found: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """The norm of x [t, C] in wide; mean (0 with RMSNorm) and 1 / rms of every row go to ``found`` [t, 2]."""
    if form.norm == "LayerNorm":
        var, mean = torch.var_mean(x, dim=-1, correction=0)
        x.sub_(mean.unsqueeze(-1))
    else:
        length = torch.linalg.vector_norm(x, dim=-1)
        var, mean = length * length / x.shape[-1], torch.zeros_like(length)
    found[:, 0], found[:, 1] = mean, torch.rsqrt(var + form.norm_eps)
    x.mul_(found[:, 1:])
    if weight is not None:
        x.mul_(weight)
    if bias is not None:
        x.add_(bias)


def _norm_gradient(
    form: Form, grad: Tensor, scratch: Tensor, found: Tensor, weight: Tensor | None, sums: Tensor, into: Tensor
) -> None:
    """From the gradient of the norm [t, C] to that of x, ``into``; adds weight's and bias's to ``sums`` [2, C].

    ``scratch`` [2, t, C]: x, and room for as much; both are overwritten.
    """
    x, products = scratch
    C, shift = x.shape[1], None
    if form.norm == "LayerNorm":
        sums[1] += grad.sum(0)
        shift = grad.mean(-1, keepdim=True) if weight is None else grad.mv(weight).unsqueeze(-1) / C
        x.sub_(found[:, :1])
    hat = x.mul_(found[:, 1:])
    torch.mul(grad, hat, out=products)
    if weight is None:
        along = products.mean(-1, keepdim=True)
        into.copy_(grad)
    else:
        sums[0] += products.sum(0)
        along = products.mv(weight).unsqueeze(-1) / C
        torch.mul(grad, weight, out=into)
    into.addcmul_(hat, along, value=-1)
    if shift is not None:
        into.sub_(shift)
    into.mul_(found[:, 1:])


def leave_backward(
    form: Form, grad: Tensor, new: Tensor, read: Tensor, found: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of ``leave``'s result -> of x before the norm [T, R, D] in wide, of read, and [2, C] of weight, bias."""
    T, N, D = new.shape
    R, wide = form.num_reads, read.dtype
    g_x = torch.empty(T, R, D, dtype=wide, device=new.device)
    g_read = torch.empty(T, N, R, dtype=wide, device=new.device)
    sums = torch.zeros(2, R * D, dtype=wide, device=new.device)
    parts = blocks(new)
    # One piece of memory for all blocks: new memory for each would be none of what is in the cache.
    scratch = torch.empty(2, _longest(parts) if form.norm else 0, R, D, dtype=wide, device=new.device)
    for part in parts:
        rows, g_block, into = new[part].to(wide), grad[part].to(wide), g_x[part].flatten(1)
        if form.norm:
            room = scratch[:, : part.stop - part.start]
            _read_into(room[0], rows, read[part])
            _norm_gradient(form, g_block, room.flatten(2), found[part], weight, sums, into)
        else:
            into.copy_(g_block)
        g_read[part] = rows @ g_x[part].transpose(1, 2)
    return g_x, g_read, sums


def enter_backward(
    form: Form,
    g_new: Tensor | None,
    g_x: Tensor,
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
    """Gradients of H' (by later readers), x and the statistics -> of H, Y, write, keep and W; absent ones are [0]."""
    T, N, D = new.shape
    wide = read.dtype
    g_streams, *written = empty_gradients(streams, output, write, keep)
    g_projection = torch.zeros(0, dtype=wide, device=new.device) if projection is None else torch.zeros_like(projection)
    parts = blocks(new)
    scratch = torch.empty(_longest(parts), N, D, dtype=wide, device=new.device)
    for part in parts:
        grad = scratch[: part.stop - part.start]
        _read_gradient_into(grad, None if g_new is None else g_new[part].to(wide), read[part], g_x[part])
        if projection is not None:
            _add_statistics_gradient(
                form, grad, new[part].to(wide), projection, g_projection, statistics[part], g_statistics[part]
            )
        # Rounded to the streams' dtype, as it is where a stage boundary lies between the write and the read.
        grad = grad.to(new.dtype)
        if output is None or write is None or keep is None:
            g_streams[part] = grad
        else:
            results = [tensor[part] for tensor in (g_streams, *written)]
            _fold_gradient(results, grad, streams[part], output[part], write[part], keep[part])
    return g_streams, written[0], written[1], written[2], g_projection


def _read_gradient_into(total: Tensor, grad: Tensor | None, read: Tensor, g_x: Tensor) -> None:
    """``grad`` [t, N, D] and read [t, N, R] times the gradient of x [t, R, D]."""
    if read.shape[2] > 1:
        torch.bmm(read, g_x, out=total)
        if grad is not None:
            total += grad
    elif grad is not None:
        torch.addcmul(grad, read, g_x, out=total)
    else:
        torch.mul(read, g_x, out=total)


def _add_statistics_gradient(
    form: Form,
    grad: Tensor,
    block: Tensor,
    projection: Tensor,
    g_projection: Tensor,
    statistics: Tensor,
    g_statistics: Tensor,
) -> None:
    """Into ``grad`` [t, N, D]: what flows through the statistics; into ``g_projection``: through the logits."""
    K, width = projection.shape
    rows, into = block.view(-1, width), grad.view(-1, width)
    found = g_statistics.reshape(-1, K + 2)
    into.addmm_(found[:, :K], projection)
    g_projection.addmm_(found[:, :K].t(), rows)
    scale = found[:, K + 1 :] * (2 / width)
    into.addcmul_(rows, scale)
    if form.is_centred:
        # The variance does not change with the mean; what is left is the mean's own share and the centring of the rows.
        mean = statistics.reshape(-1, K + 2)[:, K : K + 1]
        into.add_(found[:, K : K + 1] / width - scale * mean)


def _fold_gradient(
    results: list[Tensor], grad: Tensor, streams: Tensor, output: Tensor, write: Tensor, keep: Tensor
) -> None:
    """From the gradient of H' to those of H, Y, write and keep, put into ``results``."""
    wide = grad.to(write.dtype)
    across = wide.transpose(1, 2)
    for result, (left, right) in zip(
        results,
        ((keep, wide), (write, wide), (output.to(write.dtype), across), (streams.to(write.dtype), across)),
        strict=True,
    ):
        if result.dtype == left.dtype:
            torch.bmm(left, right, out=result)
        else:
            result.copy_(torch.bmm(left, right))


def folds(streams: Tensor, written: Sequence[Written]) -> list[Tensor]:
    """H, then (Y, write, keep) of every write -> every H' with ``enter``'s arithmetic, a block of tokens at a time."""
    found = [torch.empty(streams.shape, dtype=streams.dtype, device=streams.device) for _ in written]
    for part in blocks(streams):
        rows = streams[part]
        for new, (output, write, keep) in zip(found, written, strict=True):
            _fold_into(new[part], rows, output[part], write[part], keep[part])
            rows = new[part]
    return found


def fold_backward(
    grad: Tensor, streams: Tensor, output: Tensor, write: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of H' -> of H, Y, write and keep."""
    found = empty_gradients(streams, output, write, keep)
    for part in blocks(streams):
        inputs = (streams[part], output[part], write[part], keep[part])
        _fold_gradient([tensor[part] for tensor in found], grad[part].contiguous(), *inputs)
    return found
