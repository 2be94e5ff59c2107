"""One boundary of the hyper-connection family: write of a sublayer, weights and read of the next one, and its norm.

Dims: T tokens, N streams, D width of one stream, R parts read and written (1; fractions: up to N), C = R D, K logits.

    H' = keep^T H + write^T Y          z = H' W^T, row by row (joint: of all N D numbers of a token at once)
    (read', write', keep') = coefficients((z - mean(H') sum(W)) / sqrt(var(H') + eps))     x = norm(read'^T H')

With RMSNorm mean is 0 and var the mean square. The norm is applied after the product, so that one pass over H' serves
both. Saved are H, Y, H' (which the next boundary saves as its H; that of a read-out is folded again) and the few
numbers per token that coefficients are made of; x before its norm is made again. All contributions to the gradient of
H' meet in one buffer.

``boundary`` and ``fold`` are operations that torch knows (``torch.ops.megatron_hc``), so that torch.compile and the
policies of selective checkpoints see them. The form of a boundary is spread over plain arguments for that reason.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_hc.kernels import boundary_blocks, boundary_cpp
from megatron_hc.kernels.boundary_results import Seven, Written, empty_gradients, empty_results
from megatron_hc.kernels.coefficients import READ_OUT, Form, Weights, coefficient_gradients, coefficients, wants_triton
from megatron_hc.kernels.norm import promote


def mixing_weights(
    form: Form, statistics: Tensor, row_sums: Tensor | None, parameters: Sequence[Tensor]
) -> Weights:
    """Coefficients from the statistics [T, rows, K + 2] ([0]: static weights); ``row_sums`` [K]: sums of W's rows."""
    if statistics.dim() == 1:
        return coefficients(form, None, parameters)
    z, inverse = _centred(form, statistics, row_sums)
    return coefficients(form, z * inverse, parameters)


def _centred(form: Form, statistics: Tensor, row_sums: Tensor | None) -> tuple[Tensor, Tensor]:
    """W times the centred rows [T, rows, K], and what norms them, 1 / rms [T, rows, 1]."""
    z, mean, var = statistics.split((statistics.shape[-1] - 2, 1, 1), dim=-1)
    if row_sums is not None:
        z = z - mean * row_sums
    return z, torch.rsqrt(var + form.eps)


def _row_sums(form: Form, projection: Tensor | None) -> Tensor | None:
    return projection.sum(-1) if projection is not None and form.is_centred else None


@torch.library.custom_op("megatron_hc::boundary", mutates_args=())
def _boundary(
    streams: Tensor,
    output: Tensor | None,
    write: Tensor | None,
    keep: Tensor | None,
    projection: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    parameters: Sequence[Tensor],
    kind: str,
    num_streams: int,
    num_reads: int,
    is_joint: bool,
    is_centred: bool,
    eps: float,
    iterations: int,
    norm: str,
    norm_eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> H', x, write', keep', and for the backward pass read', the statistics, those of the norm."""
    form = Form(kind, num_streams, num_reads, is_joint, is_centred, eps, iterations, norm, norm_eps, backend)
    pieces = implementation(form, streams)
    if hasattr(pieces, "forward"):
        inputs = (streams, output, write, keep, projection, norm_weight, norm_bias, list(parameters))
        return pieces.forward(form, *inputs, _row_sums(form, projection))
    new, statistics = pieces.enter(form, streams, output, write, keep, projection)
    T = streams.shape[0]
    mixed = mixing_weights(form, statistics, _row_sums(form, projection), parameters)
    read, write, keep = (w.expand(T, -1, -1).clone(memory_format=torch.contiguous_format) for w in mixed)
    x, norm_statistics = pieces.leave(form, new, read, norm_weight, norm_bias)
    return new, x, write, keep, read, statistics, norm_statistics


@_boundary.register_fake
def _(
    streams: Tensor,
    output: Tensor | None,
    write: Tensor | None,
    keep: Tensor | None,
    projection: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    parameters: Sequence[Tensor],
    *form: Any,
) -> tuple[Tensor, ...]:
    return empty_results(streams, form[2], projection, form[7])


def _own(tensor: Tensor) -> Tensor:
    """Itself or a copy: an operation returns no tensor twice, and no view of another result."""
    is_whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if is_whole else tensor.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("megatron_hc::boundary_backward", mutates_args=())
def _boundary_backward(
    g_new: Tensor | None,
    g_x: Tensor,
    g_write: Tensor,
    g_keep: Tensor,
    streams: Tensor,
    output: Tensor | None,
    write: Tensor | None,
    keep: Tensor | None,
    projection: Tensor | None,
    norm_weight: Tensor | None,
    parameters: Sequence[Tensor],
    new: Tensor,
    read: Tensor,
    statistics: Tensor,
    norm_statistics: Tensor,
    kind: str,
    num_streams: int,
    num_reads: int,
    is_joint: bool,
    is_centred: bool,
    eps: float,
    iterations: int,
    norm: str,
    norm_eps: float,
    backend: str,
) -> list[Tensor]:
    """-> gradients of H, Y, write, keep, W ([0] where absent), weight and bias of the norm, and the parameters."""
    form = Form(kind, num_streams, num_reads, is_joint, is_centred, eps, iterations, norm, norm_eps, backend)
    pieces = implementation(form, streams)
    if hasattr(pieces, "backward"):
        written = (streams, output, write, keep, projection, norm_weight, list(parameters), _row_sums(form, projection))
        kept = (new, read, statistics, norm_statistics)
        g_new = torch.zeros_like(new) if g_new is None else g_new
        found, g_norm, g_parameters = pieces.backward(form, g_new, g_x, g_write, g_keep, *written, *kept)
    else:
        g_mixed, g_read, g_norm = pieces.leave_backward(form, g_x, new, read, norm_statistics, norm_weight)
        g_statistics, g_sums, g_parameters = _small_gradients(
            form, statistics, _row_sums(form, projection), parameters, (g_read, g_write, g_keep)
        )
        found = pieces.enter_backward(
            form, g_new, g_mixed, read, new, statistics, g_statistics, streams, output, write, keep, projection
        )
        if g_sums is not None:
            found[4].add_(g_sums.unsqueeze(-1))
    return [*found, *(_own(g) for g in (*g_norm, *g_parameters))]


@_boundary_backward.register_fake
def _(
    g_new: Tensor | None,
    g_x: Tensor,
    g_write: Tensor,
    g_keep: Tensor,
    streams: Tensor,
    output: Tensor | None,
    write: Tensor | None,
    keep: Tensor | None,
    projection: Tensor | None,
    norm_weight: Tensor | None,
    parameters: Sequence[Tensor],
    *rest: Any,
) -> list[Tensor]:
    wide = promote(streams.dtype)
    of_projection = streams.new_empty(0, dtype=wide) if projection is None else projection.new_empty(projection.shape)
    of_norm = [streams.new_empty(g_x.shape[-1], dtype=wide) for _ in range(2)]
    found = [*empty_gradients(streams, output, write, keep), of_projection, *of_norm]
    return [*found, *(p.new_empty(p.shape) for p in parameters)]


def _small_gradients(
    form: Form,
    statistics: Tensor,
    row_sums: Tensor | None,
    parameters: Sequence[Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Gradients of read, write and keep -> of the statistics, the row sums (None) and the parameters."""
    if statistics.dim() == 1:
        return statistics, None, coefficient_gradients(form, None, parameters, grads)[1]
    z, inverse = _centred(form, statistics, row_sums)
    g_logits, g_parameters = coefficient_gradients(form, z * inverse, parameters, grads)
    assert g_logits is not None
    g_z = g_logits * inverse
    g_var = (g_logits * z).sum(-1, keepdim=True) * (-0.5 * inverse**3)
    g_mean, g_sums = torch.zeros_like(g_var), None
    if row_sums is not None:
        g_mean = -(g_z * row_sums).sum(-1, keepdim=True)
        g_sums = -(g_z * statistics[..., -2:-1]).sum((0, 1))
    return torch.cat((g_z, g_mean, g_var), dim=-1), g_sums, g_parameters


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    streams, y, write, keep, projection, norm_weight, norm_bias, parameters, *form = inputs
    new, _, _, _, read, statistics, norm_statistics = output
    ctx.form, ctx.has_bias = form, norm_bias is not None
    ctx.set_materialize_grads(False)  # nothing reads the streams after the last boundary
    ctx.mark_non_differentiable(read, statistics, norm_statistics)
    kept = None if form[0] == READ_OUT and y is not None else new
    ctx.save_for_backward(
        streams, y, write, keep, projection, norm_weight, kept, read, statistics, norm_statistics, *parameters
    )


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    streams, y, write, keep, projection, norm_weight, new, read, *rest = ctx.saved_tensors
    statistics, norm_statistics, *parameters = rest
    if new is None:
        new = torch.ops.megatron_hc.fold(streams, y, write, keep, ctx.form[-1], ctx.form[0])
    (T, N, R), (g_new, g_x, g_write, g_keep, *_) = read.shape, grads
    g_x = new.new_zeros(T, R * new.shape[2]) if g_x is None else g_x
    g_write = read.new_zeros(T, R, N) if g_write is None else g_write
    g_keep = read.new_zeros(T, N, N) if g_keep is None else g_keep
    found = torch.ops.megatron_hc.boundary_backward(
        *(g_new, g_x, g_write, g_keep, streams, y, write, keep, projection, norm_weight, parameters),
        *(new, read, statistics, norm_statistics, *ctx.form),
    )
    g_streams, g_y, g_write, g_keep, g_projection, g_weight, g_bias, *g_parameters = found
    has_output, has_norm = y is not None, norm_weight is not None
    of_inputs = (
        g_streams,
        *((g_y, g_write, g_keep) if has_output else (None, None, None)),
        g_projection if projection is not None else None,
        g_weight.to(norm_weight.dtype) if has_norm else None,
        g_bias.to(norm_weight.dtype) if ctx.has_bias else None,
        g_parameters,
    )
    return (*of_inputs, *(None for _ in ctx.form))


torch.library.register_autograd("megatron_hc::boundary", _backward, setup_context=_save)


@torch.library.custom_op("megatron_hc::fold", mutates_args=())
def _fold(streams: Tensor, output: Tensor, write: Tensor, keep: Tensor, backend: str, kind: str) -> Tensor:
    form = Form(kind, streams.shape[1], output.shape[1], False, False, 0.0, backend=backend)
    return folds(form, streams, [(output, write, keep)])[0]


@_fold.register_fake
def _(streams: Tensor, output: Tensor, write: Tensor, keep: Tensor, backend: str, kind: str) -> Tensor:
    return streams.new_empty(streams.shape)


@torch.library.custom_op("megatron_hc::fold_backward", mutates_args=())
def _fold_backward(
    grad: Tensor, streams: Tensor, output: Tensor, write: Tensor, keep: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backend(backend).fold_backward(grad, streams, output, write, keep)


@_fold_backward.register_fake
def _(
    grad: Tensor, streams: Tensor, output: Tensor, write: Tensor, keep: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_gradients(streams, output, write, keep)


def _save_fold(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward_of_fold(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (*torch.ops.megatron_hc.fold_backward(grad, *ctx.saved_tensors, ctx.backend), None, None)


torch.library.register_autograd("megatron_hc::fold", _backward_of_fold, setup_context=_save_fold)


def implementation(form: Form, streams: Tensor) -> ModuleType:
    """The module that does the large parts of a boundary of this form, or with ``forward`` and ``backward`` all of it.

    What Triton has no kernel for is done in torch.
    """
    if wants_triton(form, streams):
        from megatron_hc.kernels import boundary_triton, boundary_triton_joint

        for module in (boundary_triton, boundary_triton_joint):
            if module.can_do(form, streams):
                return module
    return _backend(form.backend)


def _backend(name: str) -> ModuleType:
    return boundary_cpp if name == "cpp" else boundary_blocks


def check_backend(name: str, device: torch.device) -> None:
    """``ValueError`` where the device has no such backend, or where it cannot be built."""
    if name == "cpp":
        if device.type != "cpu":
            raise ValueError(f"--fused-residual-backend cpp is for --device cpu, not {device.type}: use triton or auto")
        boundary_cpp.operations()
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            raise ValueError("--fused-residual-backend triton needs Triton, which comes with torch for CUDA")
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"--fused-residual-backend triton needs --device cuda, not {device.type}: use torch or cpp"
            )


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
) -> Seven:
    """H [T, N, D], Y [T, R, D], write [T, R, N], keep [T, N, N] -> H' [T, N, D], x [T, C], write', keep', and without
    gradients read' [T, N, R], the statistics and those of the norm (``empty_results``).

    Y, write and keep are None where nothing is pending (the first boundary of a model or a pipeline stage): H' is then
    a copy of H. ``projection``: W [K, D], joint [K, N D], in at least fp32 and with the norm's weight taken up; None:
    the weights do not depend on the token. ``norm_weight`` and ``norm_bias`` [C] belong to ``form.norm``.
    ``parameters``: what ``coefficients`` takes, in at least fp32.
    Deterministic; equal to the plain form (``LinearMix.settle`` and ``mixed``, then the norm) up to the order of sums.
    """
    return torch.ops.megatron_hc.boundary(
        *(streams, output, write, keep, projection, norm_weight, norm_bias, list(parameters)), *form
    )


class _Known(torch.autograd.Function):
    """Keeps ``kept`` and computes nothing; no backward pass runs through it, it is for hooks on what is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, new: Tensor, write: Tensor, keep: Tensor, *kept: Tensor | None) -> Any:
        ctx.save_for_backward(*kept)
        return new.view_as(new), x.view_as(x), write.view_as(write), keep.view_as(keep)


def known(form: Form, inputs: Sequence[Any], results: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``boundary`` of ``inputs``, whose results but for x are known: H', write', keep', read' and both statistics.

    Nothing is computed, and x holds nothing. Autograd is given to keep what it keeps of a sublayer's boundary, in the
    same order.
    """
    *tensors, _, parameters = inputs  # the norm's bias is not kept
    new, write, keep, *rest = results
    x = new.new_empty(1).expand(new.shape[0], form.num_reads * new.shape[2])
    return _Known.apply(x, new, write, keep, *tensors, new, *rest, *parameters)


def folds(form: Form, streams: Tensor, written: Sequence[Written]) -> list[Tensor]:
    """H, (Y, write, keep) of boundary after boundary -> each one's H', the bits of ``boundary``; no gradients."""
    return implementation(form, streams).folds(streams, written)


def fold(
    streams: Tensor, output: Tensor, write: Tensor, keep: Tensor, backend: str = "auto", kind: str = "tanh"
) -> Tensor:
    """H' = keep^T H + write^T Y, the bits of a ``boundary`` of this ``Form.kind``; gradients are torch's or C++'s."""
    return torch.ops.megatron_hc.fold(streams, output, write, keep, backend, kind)
