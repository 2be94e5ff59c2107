"""Collectives, and the autograd Functions around them: each beside its adjoint.

Every function is the identity on group ``None`` (an axis of size 1). "Sequence" is dim 0 of [S, B, ...].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hc.kernels.compiled import own

Group = Any  # dist.ProcessGroup | CountedGroup | None


@dataclass(eq=False)
class CountedGroup:
    """A group that notes what this rank sends through it.

    Without ``members`` nothing is sent and results have the right shape only: that, on the meta device, is how a layout
    is measured before it exists.
    """

    name: str
    size: int
    rank: int
    sent: Counter[tuple[str, str]]
    """(name of the group, collective) -> bytes that this rank sends to others, by the ring algorithms."""
    members: Any = None
    """The process group that does the work."""


def _noted(kind: str, num_bytes: float, group: Group) -> Any:
    """The process group to call, once a counting one has noted the bytes sent; None: there is nobody to send to."""
    if not isinstance(group, CountedGroup):
        return group
    group.sent[group.name, kind] += num_bytes  # type: ignore[assignment]
    return group.members


def _ring_bytes(x: Tensor, group: Group) -> int:
    """What a ring passes on of a shard ``x``: to all ranks but the one that has it last."""
    return x.numel() * x.element_size() * (group_size(group) - 1)

# torch 2.13 deprecates the *_tensor names, 2.11 does not have the new ones.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def group_size(group: Group) -> int:
    if isinstance(group, CountedGroup):
        return group.size
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: Group) -> int:
    if isinstance(group, CountedGroup):
        return group.rank
    return 0 if group is None else dist.get_rank(group)


# ---- plain collectives, no gradients ----


def all_reduce(x: Tensor, group: Group, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduce ``x`` in place over the group and return it."""
    return start_all_reduce(x, group, op, is_async=False)[0]


def all_gather(x: Tensor, group: Group) -> Tensor:
    """[S, ...] -> [ranks * S, ...], joined in the order of ranks."""
    return start_all_gather(x, group, is_async=False)[0]


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """[ranks * S, ...] -> the sum's own part [S, ...]."""
    return start_reduce_scatter(x, group, is_async=False)[0]


def start_all_reduce(
    x: Tensor, group: Group, op: Any = dist.ReduceOp.SUM, *, is_async: bool = True
) -> tuple[Tensor, Any]:
    """``all_reduce`` that goes on by itself: (its result, the work to ``wait()`` for first, None if there is none)."""
    if group is None:
        return x, None
    members = _noted("all_reduce", 2 * _ring_bytes(x, group) / group_size(group), group)
    return x, None if members is None else dist.all_reduce(x, op=op, group=members, async_op=is_async)


def start_all_gather(x: Tensor, group: Group, *, is_async: bool = True) -> tuple[Tensor, Any]:
    """``all_gather`` that goes on by itself."""
    if group is None:
        return x, None
    out = x.new_empty((group_size(group) * x.shape[0], *x.shape[1:]))
    members = _noted("all_gather", _ring_bytes(x, group), group)
    return out, None if members is None else _all_gather_single(out, x.contiguous(), group=members, async_op=is_async)


def start_reduce_scatter(x: Tensor, group: Group, *, is_async: bool = True) -> tuple[Tensor, Any]:
    """``reduce_scatter`` that goes on by itself."""
    if group is None:
        return x, None
    out = x.new_empty((x.shape[0] // group_size(group), *x.shape[1:]))
    members = _noted("reduce_scatter", _ring_bytes(out, group), group)
    return out, None if members is None else _reduce_scatter_single(
        out, x.contiguous(), group=members, async_op=is_async
    )


def all_to_all(x: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
    """Rows of dim 0 to other ranks: ``sent[r]`` to rank r, ``received[r]`` from it, in the order of ranks."""
    if group is None:
        return x
    out = x.new_empty((sum(received), *x.shape[1:]))
    per_row = x.element_size() * (x[:1].numel() if x.shape[0] else 0)
    members = _noted("all_to_all", per_row * (sum(sent) - sent[group_rank(group)]), group)
    if members is not None:
        dist.all_to_all_single(out, x.contiguous(), list(received), list(sent), group=members)
    return out


def own_part(x: Tensor, group: Group) -> Tensor:
    """[ranks * S, ...] -> this rank's [S, ...], a view."""
    return x if group is None else x.chunk(group_size(group), dim=0)[group_rank(group)]


# ---- with gradients ----


class _CopyToRegion(torch.autograd.Function):
    """Forward: identity. Backward: all-reduce, because every rank's shard of weights used the same input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0].contiguous().clone(), ctx.group), None


class _ReduceFromRegion(torch.autograd.Function):
    """Forward: all-reduce of partial sums. Backward: identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return own(all_reduce(x.contiguous().clone(), group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _GatherSequence(torch.autograd.Function):
    """Forward: all-gather of sequence shards. Backward: reduce-scatter, for every rank used the whole sequence."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return own(all_gather(x, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grads[0], ctx.group), None


class _ReduceScatterSequence(torch.autograd.Function):
    """Forward: reduce-scatter of partial sums to sequence shards. Backward: all-gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return own(reduce_scatter(x, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_gather(grads[0], ctx.group), None


class _ExchangeRows(torch.autograd.Function):
    """Forward: rows to other ranks. Backward: their gradients come back the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
        ctx.sizes, ctx.group = (sent, received), group
        return own(all_to_all(x, sent, received, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received = ctx.sizes
        return all_to_all(grads[0], received, sent, ctx.group), None, None, None


class _SumOverRegion(torch.autograd.Function):
    """Forward: all-reduce. Backward: all-reduce, for every rank goes on with the sum in its own way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return own(all_reduce(x.contiguous().clone(), group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0].contiguous().clone(), ctx.group), None


def copy_to_region(x: Tensor, group: Group) -> Tensor:
    """Enter a tensor-parallel region with an input that all ranks hold."""
    return x if group is None else _CopyToRegion.apply(x, group)


def reduce_from_region(x: Tensor, group: Group) -> Tensor:
    """Leave a tensor-parallel region: sum the ranks' partial outputs."""
    return x if group is None else _ReduceFromRegion.apply(x, group)


def gather_sequence(x: Tensor, group: Group) -> Tensor:
    """Enter a tensor-parallel region from sequence shards."""
    return x if group is None else _GatherSequence.apply(x, group)


def reduce_scatter_sequence(x: Tensor, group: Group) -> Tensor:
    """Leave a tensor-parallel region to sequence shards."""
    return x if group is None else _ReduceScatterSequence.apply(x, group)


def exchange_rows(x: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
    """``all_to_all``."""
    return x if group is None else _ExchangeRows.apply(x, sent, received, group)


def sum_over_region(x: Tensor, group: Group) -> Tensor:
    """Sum inside a tensor-parallel region (statistics of a width that is sharded)."""
    return x if group is None else _SumOverRegion.apply(x, group)
