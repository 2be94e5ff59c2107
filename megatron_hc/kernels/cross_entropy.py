"""Output layer and cross entropy in one, a chunk of tokens at a time.

Dims: T tokens, C hidden size, V vocabulary rows held here (padding included).

Logits of the whole batch never exist: a chunk's logits give its losses and, in the same pass, its gradients, which the
backward pass only scales. At 128k entries and 8k tokens that saves 4 GB of fp32 logits and their gradient.

On CUDA a chunk is larger, its logits stay in the weights' dtype (their rounding is that of the product either way), one
Triton kernel turns them into their gradients, and the weight's gradient is summed in fp32 by the products themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_hc.kernels.choice import runs_in_triton
from megatron_hc.kernels.norm import promote

CHUNK_LOGITS = 1 << 25  # logits of one chunk: 128 MiB in fp32, large enough that the products run at full speed
CHUNK_BYTES = 1 << 30
"""The same in Triton. A chunk also reads and writes the fp32 gradient of all V weights once, which takes as long as its
product for some 800 tokens does on an H100; 1 GiB is 4,096 tokens of bf16 logits at 128k entries, and less than the
products of smaller chunks took in fp32."""


def chunk_tokens(weight: Tensor, in_triton: bool = False) -> int:
    """Tokens whose logits are held at one time; where there is room for them, whole tiles of a product."""
    if not in_triton:
        return max(1, CHUNK_LOGITS // weight.shape[0])
    tokens = CHUNK_BYTES // (weight.shape[0] * weight.element_size())
    return tokens - tokens % 128 if tokens > 128 else max(1, tokens)


class VocabShard(NamedTuple):
    """Which rows of the vocabulary are held here, and how the ranks that hold the others are asked."""

    first_row: int = 0
    reduce: Callable[[Tensor, str], Tensor] | None = None
    """(tensor, "sum" or "max") -> its reduction over all shards, in place; None: the vocabulary is whole."""


WHOLE = VocabShard()


def chunk_logits(hidden: Tensor, weight: Tensor, vocab_size: int, shard: VocabShard = WHOLE) -> Tensor:
    """[T, C] x [V, C] -> logits [T, V] in at least fp32; padding rows are -inf."""
    logits = (hidden @ weight.t()).to(promote(weight.dtype))
    num_real = _num_real(weight, vocab_size, shard)
    if num_real < weight.shape[0]:
        logits[:, num_real:] = float("-inf")
    return logits


def _num_real(weight: Tensor, vocab_size: int, shard: VocabShard) -> int:
    """Rows of ``weight`` that are no padding."""
    return min(max(vocab_size - shard.first_row, 0), weight.shape[0])


class _Target(NamedTuple):
    """Where the labels of a chunk lie in this shard; both [T, 1]."""

    row: Tensor
    is_here: Tensor | None
    """None: every label is here."""


def _target(labels: Tensor, num_rows: int, shard: VocabShard) -> _Target:
    if shard.reduce is None:
        return _Target(labels[:, None], None)
    row = labels[:, None] - shard.first_row
    is_here = (row >= 0) & (row < num_rows)
    return _Target(row.masked_fill(~is_here, 0), is_here)


def _log_sum_and_label(logits: Tensor, target: _Target, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """logits [T, V] -> (log sum exp over the whole vocabulary, the label's logit), each [T, 1]."""
    of_label = logits.gather(1, target.row)
    if shard.reduce is None:
        return logits.logsumexp(-1, keepdim=True), of_label
    # A shard of nothing but padding has maximum -inf; the maximum over all shards is finite.
    top = shard.reduce(logits.max(-1, keepdim=True).values, "max")
    assert target.is_here is not None
    sums = torch.stack(((logits - top).exp().sum(-1, keepdim=True), of_label.masked_fill(~target.is_here, 0.0)))
    total, of_label = shard.reduce(sums, "sum").unbind(0)
    return total.log() + top, of_label


def _log_probs_and_label(logits: Tensor, target: _Target, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """logits [T, V], which are lost -> (log softmax over the whole vocabulary [T, V], the label's [T, 1])."""
    if shard.reduce is None:
        log_probs = logits.log_softmax(-1)
        return log_probs, log_probs.gather(1, target.row)
    log_sum, of_label = _log_sum_and_label(logits, target, shard)
    return logits.sub_(log_sum), of_label - log_sum


def _torch_chunk(
    hidden: Tensor, weight: Tensor, labels: Tensor, scales: Tensor, vocab_size: int, shard: VocabShard, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """A chunk's weighted loss, and its logits' gradient [T, V] in the weights' dtype (as asked for)."""
    target, scale = _target(labels, weight.shape[0], shard), scales[:, None]
    log_probs, of_label = _log_probs_and_label(chunk_logits(hidden, weight, vocab_size, shard), target, shard)
    loss = -(of_label * scale).sum()
    if not needs_grad:
        return loss, log_probs
    grad = log_probs.exp_()  # d loss / d logits = softmax - one-hot
    one = torch.ones_like(of_label) if target.is_here is None else target.is_here.to(of_label.dtype)
    grad.scatter_add_(1, target.row, -one)
    return loss, grad.mul_(scale).to(weight.dtype)


def _triton_chunk(
    hidden: Tensor, weight: Tensor, labels: Tensor, scales: Tensor, vocab_size: int, shard: VocabShard, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """The same in place of the logits."""
    from megatron_hc.kernels import cross_entropy_triton

    logits = hidden @ weight.t()
    here, num_real = labels - shard.first_row, _num_real(weight, vocab_size, shard)
    if shard.reduce is None:
        losses = cross_entropy_triton.losses(logits, here, scales, num_real, needs_grad)
        return (losses * scales).sum(), logits
    log_sum, of_label, _ = _triton_statistics(logits, here, num_real, shard)
    if needs_grad:
        cross_entropy_triton.write_gradient(logits, here, scales, log_sum, num_real)
    return ((log_sum - of_label) * scales).sum(), logits


def _triton_statistics(
    logits: Tensor, here: Tensor, num_real: int, shard: VocabShard
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [T, V], labels counted from this shard's first row -> log sum exp, label's logit, maximum, each [T]."""
    from megatron_hc.kernels import cross_entropy_triton

    elsewhere = float("nan") if shard.reduce is None else 0.0
    top, total, of_label = cross_entropy_triton.statistics(logits, here, num_real, elsewhere).unbind(0)
    if shard.reduce is not None:
        own, top = top, shard.reduce(top.clone(), "max")
        sums = torch.stack((total * (own - top).exp(), of_label))
        total, of_label = shard.reduce(sums, "sum").unbind(0)
    return top + total.log(), of_label, top


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total + a b, the sum kept in ``dtype`` and in place; on CUDA the product is not rounded before it is added."""
    if a.is_cuda and a.dtype != dtype:
        if total is None:
            return torch.mm(a, b, out_dtype=dtype)
        return torch.addmm(total, a, b, out_dtype=dtype, out=total)
    product = (a @ b).to(dtype)
    return product if total is None else total.add_(product)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        token_weights: Tensor,
        vocab_size: int,
        shard: VocabShard,
        backend: str,
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        needs_grad = needs_hidden or needs_weight
        dtype, in_triton = promote(weight.dtype), runs_in_triton(weight, backend)
        loss = torch.zeros((), dtype=dtype, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight: Tensor | None = None
        size = chunk_tokens(weight, in_triton)
        dtype_of_sum = dtype if hidden.shape[0] > size else weight.dtype
        run = _triton_chunk if in_triton else _torch_chunk
        for start in range(0, hidden.shape[0], size):
            part = slice(start, start + size)
            rows, scales = hidden[part], token_weights[part].to(dtype)
            term, grad = run(rows, weight, labels[part], scales, vocab_size, shard, needs_grad)
            loss += term
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[part])
            if needs_weight:
                grad_weight = _plus_product(grad_weight, grad.t(), rows, dtype_of_sum)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled = [None if g is None else g * grads[0].to(g.dtype) for g in (grad_hidden, grad_weight)]
        return scaled[0], scaled[1], None, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    vocab_size: int,
    shard: VocabShard = WHOLE,
    backend: str = "auto",
) -> Tensor:
    """sum_t token_weights[t] * (-log softmax(hidden[t] weight^T)[labels[t]]), a scalar in at least fp32.

    hidden [T, C], weight [V, C], labels [T], token_weights [T]; rows of the vocabulary from ``vocab_size`` on are
    padding. With a shard every rank gets the whole loss, and of ``hidden``'s gradient the part of its own rows.
    ``backend``: auto (Triton on CUDA, torch elsewhere), torch or triton.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, token_weights, vocab_size, shard, backend)


def token_scores(
    hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, shard: VocabShard = WHOLE, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(-log softmax(hidden weight^T)[labels], whether no token is likelier), each [T]; no gradients (for scoring)."""
    in_triton = runs_in_triton(weight, backend)
    size, losses, is_top = chunk_tokens(weight, in_triton), [], []
    for rows, chosen in zip(hidden.split(size), labels.split(size), strict=True):
        if in_triton:
            here, num_real = chosen - shard.first_row, _num_real(weight, vocab_size, shard)
            log_sum, of_label, top = _triton_statistics(rows @ weight.t(), here, num_real, shard)
        else:
            log_sum, of_label, top = _torch_statistics(rows, weight, chosen, vocab_size, shard)
        losses.append(log_sum - of_label)
        is_top.append(of_label >= top)
    return torch.cat(losses), torch.cat(is_top)


def _torch_statistics(
    hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, shard: VocabShard
) -> tuple[Tensor, Tensor, Tensor]:
    """log sum exp of the logits, the label's logit, the maximum, each [T]."""
    logits = chunk_logits(hidden, weight, vocab_size, shard)
    log_sum, of_label = _log_sum_and_label(logits, _target(labels, weight.shape[0], shard), shard)
    top = logits.max(-1).values
    return log_sum.squeeze(1), of_label.squeeze(1), top if shard.reduce is None else shard.reduce(top, "max")
