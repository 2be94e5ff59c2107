"""Output layer and cross entropy in one, a chunk of tokens at a time.

Dims: T tokens, C hidden size, V vocabulary rows held here (padding included).

Logits of the whole batch never exist: a chunk's logits give its losses and, in the same pass, its gradients, which the
backward pass only scales. At 128k entries and 8k tokens that saves 4 GB of fp32 logits and their gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_hc.kernels.norm import promote

CHUNK_LOGITS = 1 << 25  # logits of one chunk: 128 MiB in fp32, large enough that the products run at full speed


def chunk_tokens(num_rows: int) -> int:
    """Tokens whose logits are held at one time."""
    return max(1, CHUNK_LOGITS // num_rows)


class VocabShard(NamedTuple):
    """Which rows of the vocabulary are held here, and how the ranks that hold the others are asked."""

    first_row: int = 0
    reduce: Callable[[Tensor, str], Tensor] | None = None
    """(tensor, "sum" or "max") -> its reduction over all shards, in place; None: the vocabulary is whole."""


WHOLE = VocabShard()


def chunk_logits(hidden: Tensor, weight: Tensor, vocab_size: int, shard: VocabShard = WHOLE) -> Tensor:
    """[T, C] x [V, C] -> logits [T, V] in at least fp32; padding rows are -inf."""
    logits = (hidden @ weight.t()).to(promote(weight.dtype))
    real = vocab_size - shard.first_row
    if real < weight.shape[0]:
        logits[:, max(real, 0) :] = float("-inf")
    return logits


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
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dtype = promote(weight.dtype)
        loss = torch.zeros((), dtype=dtype, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight: Tensor | None = None
        size = chunk_tokens(weight.shape[0])
        for start in range(0, hidden.shape[0], size):
            part = slice(start, start + size)
            target = _target(labels[part], weight.shape[0], shard)
            log_probs, of_label = _log_probs_and_label(
                chunk_logits(hidden[part], weight, vocab_size, shard), target, shard
            )
            scale = token_weights[part, None].to(dtype)
            loss -= (of_label * scale).sum()
            if not (needs_hidden or needs_weight):
                continue
            grad = log_probs.exp_()  # d loss / d logits = softmax - one-hot
            one = torch.ones_like(of_label) if target.is_here is None else target.is_here.to(dtype)
            grad.scatter_add_(1, target.row, -one)
            grad = grad.mul_(scale).to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[part])
            if needs_weight:
                product = (grad.t() @ hidden[part]).to(dtype)
                grad_weight = product if grad_weight is None else grad_weight.add_(product)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled = [None if g is None else g * grads[0].to(g.dtype) for g in (grad_hidden, grad_weight)]
        return scaled[0], scaled[1], None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    vocab_size: int,
    shard: VocabShard = WHOLE,
) -> Tensor:
    """sum_t token_weights[t] * (-log softmax(hidden[t] weight^T)[labels[t]]), a scalar in at least fp32.

    hidden [T, C], weight [V, C], labels [T], token_weights [T]; rows of the vocabulary from ``vocab_size`` on are
    padding. With a shard every rank gets the whole loss, and of ``hidden``'s gradient the part of its own rows.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, token_weights, vocab_size, shard)


def token_scores(
    hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, shard: VocabShard = WHOLE
) -> tuple[Tensor, Tensor]:
    """(-log softmax(hidden weight^T)[labels], whether no token is likelier), each [T]; no gradients (for scoring)."""
    size = chunk_tokens(weight.shape[0])
    losses, is_top = [], []
    for rows, chosen in zip(hidden.split(size), labels.split(size), strict=True):
        logits = chunk_logits(rows, weight, vocab_size, shard)
        log_sum, of_label = _log_sum_and_label(logits, _target(chosen, weight.shape[0], shard), shard)
        top = logits.max(-1, keepdim=True).values
        top = top if shard.reduce is None else shard.reduce(top, "max")
        losses.append((log_sum - of_label).squeeze(1))
        is_top.append((of_label >= top).squeeze(1))
    return torch.cat(losses), torch.cat(is_top)
