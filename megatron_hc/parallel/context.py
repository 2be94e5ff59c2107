"""Context parallelism: each rank has consecutive tokens of every sequence, and attention the whole of it (arXiv
2309.14509; Megatron-LM's --cp-comm-type a2a).

Everything but attention takes a token by itself, the residual path included, so a rank has its part of the sequence
from the embedding to the loss. Around attention two exchanges turn its tokens of all heads into all tokens of its
heads, and back: what attention computes of a head is what one process computes of it, by the same kernel.

Dims: S sequence, B batch, P ranks, Q query heads, G key/value heads, H head width; all of one tensor-parallel rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_hc.kernels.compiled import own
from megatron_hc.parallel.collectives import Group, all_to_all, group_size


class _Exchange(torch.autograd.Function):
    """[P, ...]: part r goes to rank r, and the part from it takes its place. Its own adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return own(_exchanged(x, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _exchanged(grads[0], ctx.group), None


def _exchanged(x: Tensor, group: Group) -> Tensor:
    each = [1] * x.shape[0]
    return all_to_all(x, each, each, group)


class HeadExchange:
    """What attention of a context-parallel rank does before and after its core."""

    def __init__(self, group: Group) -> None:
        self.group, self.ranks = group, group_size(group)

    def heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [S / P, B, Q, H], k and v [S / P, B, G, H] -> of all tokens, [S, B, Q / P, H] and [S, B, G / P or 1, H].

        With fewer key/value heads than ranks each goes to all the ranks that have queries of it.
        """
        copies = max(1, self.ranks // k.shape[2])
        k, v = (x.repeat_interleave(copies, dim=2) if copies > 1 else x for x in (k, v))
        parts = [x.unflatten(2, (self.ranks, -1)) for x in (q, k, v)]  # [S / P, B, P, heads / P, H]
        sizes = [part.shape[3] for part in parts]
        moved = _Exchange.apply(torch.cat(parts, dim=3).movedim(2, 0).contiguous(), self.group)
        q, k, v = moved.flatten(0, 1).split(sizes, dim=2)
        return q, k, v

    def tokens(self, y: Tensor) -> Tensor:
        """[S, B, Q / P * H] -> of all heads, [S / P, B, Q * H]."""
        moved = _Exchange.apply(y.unflatten(0, (self.ranks, -1)).contiguous(), self.group)  # [P, S / P, B, ...]
        return moved.movedim(0, 2).flatten(2)


class SequencePart:
    """Which tokens of a sequence are this rank's."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks

    def of(self, x: Tensor) -> Tensor:
        """[B or 1, S] -> [B or 1, S / P], a view."""
        return x if self.ranks == 1 else x.chunk(self.ranks, dim=1)[self.rank]
