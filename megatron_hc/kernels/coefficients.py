"""Mixing weights of the hyper-connection family as functions of a few numbers per token.

Dims: T tokens, N streams, R parts read and written (1; fractions: up to N), K logits per row.

Small tensors only: what is large, the product that gives the logits, is in ``boundary.py``. Every function comes with
its gradient, because autograd is off inside of an operation that torch registers; by itself it is plain autograd. A
boundary names the function by a string, because such an operation takes no functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_hc.kernels.choice import runs_in_triton
from megatron_hc.kernels.sinkhorn import sinkhorn, sinkhorn_gradient

Weights = tuple[Tensor, Tensor, Tensor]
"""read [T, N, R], write [T, R, N], keep [T, N, N]; T is 1 where they do not depend on the token."""


class Form(NamedTuple):
    """What of a boundary is not a tensor."""

    kind: str
    """A name of ``COEFFICIENTS``."""
    num_streams: int
    num_reads: int
    is_joint: bool
    """One row of N D numbers per token is normed and projected, not N rows of D."""
    is_centred: bool
    """LayerNorm in front of the coefficients, not RMSNorm."""
    eps: float
    iterations: int = 0
    """Pairs of normalisations of "sinkhorn"."""
    norm: str = ""
    """The norm of what is read: RMSNorm, LayerNorm or none."""
    norm_eps: float = 0.0
    backend: str = "auto"
    """auto: Triton on CUDA, torch elsewhere; torch; cpp: a C++ operation built at first use (CPU); triton."""


def wants_triton(form: Form, tensor: Tensor) -> bool:
    """Whether kernels are Triton's where there are such: on CUDA, or where asked for (its interpreter)."""
    return runs_in_triton(tensor, form.backend)


def coefficients(form: Form, logits: Tensor | None, parameters: Sequence[Tensor]) -> Weights:
    """Normed logits [T, rows, K] (rows: N, or 1 where joint), or None for static weights, and a method's parameters."""
    return COEFFICIENTS[form.kind][0](form, logits, *parameters)


def coefficient_gradients(
    form: Form, logits: Tensor | None, parameters: Sequence[Tensor], grads: Weights
) -> tuple[Tensor | None, list[Tensor]]:
    """From the gradients of read, write and keep (all T tokens) to those of the logits and the parameters."""
    g_logits, found = COEFFICIENTS[form.kind][1](form, logits, grads, *parameters)
    return g_logits, [g.reshape(p.shape) for g, p in zip(found, parameters, strict=True)]


Gradients = tuple[Tensor | None, list[Tensor]]


def tanh_weights(
    form: Form, logits: Tensor | None, read: Tensor, keep: Tensor, write: Tensor, *scales: Tensor
) -> Weights:
    """static + s tanh(logits): read [N, R], keep [N, N], write [N]; scales alpha [1], beta [1]; K = R + N + 1."""
    N, R = read.shape
    if logits is None:
        return read.unsqueeze(0), _write_matrix(write.unsqueeze(0), R), keep.unsqueeze(0)
    alpha, beta = scales
    d_read, d_keep, d_write = torch.tanh(logits).split((R, N, 1), dim=-1)
    wide_write = _write_matrix(beta * d_write.squeeze(-1) + write, R)
    return alpha * d_read + read, wide_write, alpha * d_keep + keep


def _tanh_gradients(
    form: Form, logits: Tensor | None, grads: Weights, read: Tensor, keep: Tensor, write: Tensor, *scales: Tensor
) -> Gradients:
    g_read, g_matrix, g_keep = grads
    g_write = g_matrix.squeeze(-2) if read.shape[1] == 1 else g_matrix.diagonal(dim1=-2, dim2=-1)  # [T, N]
    static = [g_read.sum(0), g_keep.sum(0), g_write.sum(0)]
    if logits is None:
        return None, static
    alpha, beta = scales
    th = torch.tanh(logits)
    grad = torch.cat((g_read, g_keep, g_write.unsqueeze(-1)), dim=-1)  # [T, N, R + N + 1]
    products = grad * th
    scale = torch.cat((alpha.expand(grad.shape[-1] - 1), beta))
    g_scales = [products[..., :-1].sum(), products[..., -1].sum()]
    return grad * scale * (1 - th * th), [*static, *g_scales]


def _write_matrix(write: Tensor, num_reads: int) -> Tensor:
    """One write weight per stream [T, N] -> [T, R, N]."""
    return write.unsqueeze(-2) if num_reads == 1 else torch.diag_embed(write)


def virtual_weights(
    form: Form, logits: Tensor | None, read: Tensor, keep: Tensor, write: Tensor, *scales: Tensor
) -> Weights:
    """static + S tanh(logits), S one number per weight: read [N, M], keep [N, N], write [M, N]; K = M + N + M.

    scales: alpha [N, M + N], beta [M, N]. The logits come divided by sqrt(D).
    """
    N, M = read.shape
    if logits is None:
        return read.unsqueeze(0), write.unsqueeze(0), keep.unsqueeze(0)
    alpha, beta = scales
    both, d_write = torch.tanh(logits).split((M + N, M), dim=-1)
    d_read, d_keep = (alpha * both).split((M, N), dim=-1)
    return read + d_read, write + beta * d_write.transpose(-1, -2), keep + d_keep


def _virtual_gradients(
    form: Form, logits: Tensor | None, grads: Weights, read: Tensor, keep: Tensor, write: Tensor, *scales: Tensor
) -> Gradients:
    g_read, g_write, g_keep = grads
    static = [g_read.sum(0), g_keep.sum(0), g_write.sum(0)]
    if logits is None:
        return None, static
    alpha, beta = scales
    th = torch.tanh(logits)
    grad = torch.cat((g_read, g_keep, g_write.transpose(-1, -2)), dim=-1)  # [T, N, M + N + M]
    g_scale = (grad * th).sum(0)
    g_alpha, g_beta = g_scale[:, : alpha.shape[1]], g_scale[:, alpha.shape[1] :].t()
    return grad * torch.cat((alpha, beta.t()), dim=-1) * (1 - th * th), [*static, g_alpha, g_beta]


def manifold_weights(form: Form, logits: Tensor | None, bias: Tensor, *alpha: Tensor) -> Weights:
    """sigmoid, 2 sigmoid and a doubly stochastic matrix of h = alpha logits + bias.

    bias [K]: N logits of the read, N of the write, then those of the matrix; alpha [3]: one number per kind.
    """
    N = form.num_streams
    h, _ = _manifold_logits(form, logits, bias, *alpha)
    pre, post, res = h.split((N, N, bias.shape[0] - 2 * N), dim=-1)
    matrix = doubly_stochastic(form.kind, res, N, form.iterations)
    return torch.sigmoid(pre).unsqueeze(-1), 2 * torch.sigmoid(post).unsqueeze(-2), matrix.transpose(-1, -2)


def _manifold_logits(form: Form, logits: Tensor | None, bias: Tensor, *alpha: Tensor) -> tuple[Tensor, Tensor]:
    """h [T, K] and one scale per logit [K]."""
    if logits is None:
        return bias.unsqueeze(0), bias
    N = form.num_streams
    sizes = (N, N, bias.shape[0] - 2 * N)
    scales = torch.cat([a.expand(size) for a, size in zip(alpha[0].split(1), sizes, strict=True)])
    return logits.squeeze(1) * scales + bias, scales


def _manifold_gradients(
    form: Form, logits: Tensor | None, grads: Weights, bias: Tensor, *alpha: Tensor
) -> Gradients:
    N = form.num_streams
    g_read, g_write, g_keep = grads
    if logits is None:
        g_read, g_write, g_keep = (g.sum(0, keepdim=True) for g in grads)
    h, scales = _manifold_logits(form, logits, bias, *alpha)
    pre, post, res = h.split((N, N, bias.shape[0] - 2 * N), dim=-1)
    read, half = torch.sigmoid(pre), torch.sigmoid(post)
    g_res = _doubly_stochastic_gradient(form, res, g_keep.transpose(-1, -2).contiguous())
    g_h = torch.cat(
        (g_read.squeeze(-1) * read * (1 - read), g_write.squeeze(-2) * (2 * half * (1 - half)), g_res), dim=-1
    )
    if logits is None:
        return None, [g_h]
    of_scales = (g_h * logits.squeeze(1)).sum(0).split((N, N, bias.shape[0] - 2 * N))
    return (g_h * scales).unsqueeze(1), [g_h.sum(0), torch.stack([part.sum() for part in of_scales])]


def doubly_stochastic(kind: str, logits: Tensor, n: int, iterations: int = 0) -> Tensor:
    """Logits [T, M] -> H_res [T, new, old]: by Sinkhorn, as a mean of permutations, or as a Kronecker product."""
    if kind == "sinkhorn":
        return sinkhorn(logits.unflatten(-1, (n, n)), iterations)
    if kind == "permutations":
        table = permutation_matrices(n, logits.device, logits.dtype).flatten(1)
        return (torch.softmax(logits, dim=-1) @ table).unflatten(-1, (n, n))
    return _kronecker_product(_kronecker_factors(logits).unbind(1))


def _doubly_stochastic_gradient(form: Form, logits: Tensor, grad: Tensor) -> Tensor:
    """Gradient of H_res [T, n, n] -> of the logits [T, M]."""
    n = form.num_streams
    if form.kind == "sinkhorn":
        return sinkhorn_gradient(logits.unflatten(-1, (n, n)), grad, form.iterations).flatten(1)
    if form.kind == "permutations":
        shares = torch.softmax(logits, dim=-1)
        through = grad.flatten(1) @ permutation_matrices(n, logits.device, logits.dtype).flatten(1).t()
    else:
        shares, through = _kronecker_gradient(logits, grad)
    groups = (-1, 2) if form.kind == "kronecker" else (1, -1)
    shares, through = shares.unflatten(-1, groups), through.unflatten(-1, groups)
    return (shares * (through - (shares * through).sum(-1, keepdim=True))).flatten(1)


def _kronecker_factors(logits: Tensor) -> Tensor:
    """[T, 2 m] -> m matrices [[a, b], [b, a]], (a, b) = softmax of two logits: [T, m, 2, 2]."""
    pairs = torch.softmax(logits.unflatten(-1, (-1, 2)), dim=-1)
    return torch.stack((pairs, pairs.flip(-1)), dim=-2)


def _kronecker_product(factors: Sequence[Tensor]) -> Tensor:
    """[T, 2, 2] each -> [T, 2^m, 2^m]"""
    product = factors[0]
    for factor in factors[1:]:
        # [T, i, i', j, j'] = product[i, j] * factor[i', j']
        product = (product[:, :, None, :, None] * factor[:, None, :, None, :]).flatten(3, 4).flatten(1, 2)
    return product


def _kronecker_gradient(logits: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) of every factor and their gradients, both [T, 2 m]: the product is linear in each factor."""
    factors = _kronecker_factors(logits)
    one = torch.eye(2, dtype=logits.dtype, device=logits.device).expand_as(factors[:, 0])
    found = []
    for f in range(factors.shape[1]):
        for unit in (one, one.flip(-1)):
            others = [unit if g == f else factors[:, g] for g in range(factors.shape[1])]
            found.append((grad * _kronecker_product(others)).sum((-1, -2)))
    return factors[:, :, 0].flatten(1), torch.stack(found, dim=-1)


def permutation_matrices(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """All permutations of n things as matrices [n!, n, n], in lexicographic order (the first is the identity).

    Made of arithmetic on the device (the factorial digits of 0 .. n! - 1), so that a forward pass copies nothing to it.
    """
    number = torch.arange(math.factorial(n), device=device).unsqueeze(1)  # [n!, 1]
    free = torch.ones(math.factorial(n), n, dtype=torch.long, device=device)
    rows = []
    for place in range(n):
        digit = number // math.factorial(n - 1 - place) % (n - place)
        row = free * (free.cumsum(1) == digit + 1)  # the digit-th column that is still free
        free = free - row
        rows.append(row)
    return torch.stack(rows, dim=1).to(dtype)


READ_OUT = "read-out"
"""Constant weights; H' has no other reader, so that it is not kept but folded again in the backward pass."""

COEFFICIENTS: dict[str, tuple[Callable[..., Weights], Callable[..., Gradients]]] = {
    "tanh": (tanh_weights, _tanh_gradients),
    READ_OUT: (tanh_weights, _tanh_gradients),
    "virtual": (virtual_weights, _virtual_gradients),
    "sinkhorn": (manifold_weights, _manifold_gradients),
    "permutations": (manifold_weights, _manifold_gradients),
    "kronecker": (manifold_weights, _manifold_gradients),
}
"""The weights and their gradients, by ``Form.kind``."""
