"""Context parallelism: each rank has consecutive tokens of every sequence, and attention the whole of it (arXiv
2309.14509; Megatron-LM's --cp-comm-type a2a).

Everything but attention takes a token by itself, the residual path included, so a rank has its part of the sequence
from the embedding to the loss. Around attention two exchanges turn its tokens of all heads into all tokens of its
heads, and back: what attention computes of a head is what one process computes of it, by the same kernel.

Dims: S sequence, B batch, P ranks, Q query heads, G key/value heads, H head width; all of one tensor-parallel rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_hc.parallel.collectives import Group, exchange_rows, group_size


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
        moved = self._exchanged(torch.cat(parts, dim=3).movedim(2, 0))
        q, k, v = moved.flatten(0, 1).split(sizes, dim=2)
        return q, k, v

    def tokens(self, y: Tensor) -> Tensor:
        """[S, B, Q / P * H] -> of all heads, [S / P, B, Q * H]."""
        moved = self._exchanged(y.unflatten(0, (self.ranks, -1)))  # [P, S / P, B, ...]
        return moved.movedim(0, 2).flatten(2)

    def _exchanged(self, x: Tensor) -> Tensor:
        """[P, ...]: part r goes to rank r, and the part from it takes its place."""
        each = [1] * self.ranks
        return exchange_rows(x, each, each, self.group)
