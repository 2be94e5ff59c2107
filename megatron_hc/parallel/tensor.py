"""Tensor- and sequence-parallel versions of the model's modules: same parameters, a shard of them, and collectives.

A module of the plain model becomes its parallel version in place (``plan.py`` says which): the class changes, the
parameters are cut when they are given their values. Under sequence parallelism the streams, norms and residuals hold
[S / tp, B, ...]; a region starts with an all-gather and ends with a reduce-scatter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hc.kernels.cross_entropy import VocabShard, chunk_logits, linear_cross_entropy
from megatron_hc.kernels.embedding import embedded
from megatron_hc.kernels.norm import promote
from megatron_hc.model.gpt import PositionTable, VocabTable
from megatron_hc.model.linear import Linear, NormLayer
from megatron_hc.parallel.collectives import (
    Group,
    all_gather,
    all_reduce,
    copy_to_region,
    gather_sequence,
    group_rank,
    group_size,
    own_part,
    reduce_from_region,
    reduce_scatter_sequence,
    sum_over_region,
)


class Region:
    """Where a parallel module stands: its group, and whether its outside is sharded over the sequence."""

    def __init__(self, group: Group, sequence_parallel: bool) -> None:
        self.group, self.sequence_parallel = group, sequence_parallel

    def enter(self, x: Tensor) -> Tensor:
        return gather_sequence(x, self.group) if self.sequence_parallel else copy_to_region(x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        if self.sequence_parallel:
            return reduce_scatter_sequence(x, self.group)
        return reduce_from_region(x, self.group)


class ColumnParallelLinear(Linear):
    """Each rank has some rows of W (and of b): the whole input in, its part of the output out."""

    region: Region

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(self.region.enter(x.to(self.weight.dtype)), self.bias)

    def forward_parts(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        # Parts that share an input enter with it once.
        shared = {id(x): x for x in inputs.values()}
        entered = {key: self.region.enter(x.to(self.weight.dtype)) for key, x in shared.items()}
        return super().forward_parts({name: entered[id(x)] for name, x in inputs.items()})


class WidthParallelNorm(NormLayer):
    """A norm of a width that is cut: every rank norms its own part, with the statistics of all.

    The squares are of what is already centred, so that a large mean costs no digits.
    """

    region: Region

    def forward(self, x: Tensor) -> Tensor:
        wide = promote(x.dtype)
        y = x.to(wide)
        if self.kind == "LayerNorm":
            y = y - self.mean(y)
        y = y * torch.rsqrt(self.mean(y.square()) + self.eps) * self.weight.to(wide)
        return (y if self.bias is None else y + self.bias.to(wide)).to(x.dtype)

    def mean(self, x: Tensor) -> Tensor:
        """[..., own part] -> [..., 1] over the whole width."""
        width = x.shape[-1] * group_size(self.region.group)
        return sum_over_region(x.sum(-1, keepdim=True), self.region.group) / width


class RowParallelLinear(Linear):
    """Each rank has some columns of W and the matching part of the input; b is added once, after the sum."""

    region: Region

    def forward(self, x: Tensor) -> Tensor:
        y = self.region.leave(self.multiply(x.to(self.weight.dtype), None))
        return y if self.bias is None else y + self.bias


class ParallelPositionTable(PositionTable):
    """Whole on every rank; under sequence parallelism each looks up its own part of the sequence."""

    region: Region

    def forward(self, position_ids: Tensor) -> Tensor:
        if self.region.sequence_parallel:
            position_ids = own_part(position_ids.t(), self.region.group).t()
        return super().forward(position_ids)


class VocabParallelTable(VocabTable):
    """Each rank has ``V / tp`` rows of the table."""

    region: Region

    @property
    def shard(self) -> VocabShard:
        group = self.region.group

        def reduce(x: Tensor, op: str) -> Tensor:
            return all_reduce(x, group, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)

        return VocabShard(first_row=group_rank(group) * self.weight.shape[0], reduce=reduce)

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, S] -> [S, B, C], or [S / tp, B, C] under sequence parallelism."""
        rows = tokens.t() - self.shard.first_row
        is_elsewhere = (rows < 0) | (rows >= self.weight.shape[0])
        hidden = embedded(rows.masked_fill(is_elsewhere, 0), self.weight)
        return self.region.leave(hidden.masked_fill(is_elsewhere.unsqueeze(-1), 0.0))

    def logits(self, hidden: Tensor) -> Tensor:
        """The whole vocabulary's logits on every rank, for generating; no gradients."""
        whole = self.whole(hidden)
        local = chunk_logits(whole.flatten(0, 1).to(self.weight.dtype), self.weight, self.vocab_size, self.shard)
        parts = all_gather(local.t().contiguous(), self.region.group)  # [V, tokens]
        return parts.t()[:, : self.vocab_size].unflatten(0, whole.shape[:2])

    def loss(self, hidden: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        flat = self.region.enter(hidden.to(self.weight.dtype)).flatten(0, 1)
        labels, weights = labels.t().reshape(-1), weights.t().reshape(-1)
        return linear_cross_entropy(flat, self.weight, labels, weights, self.vocab_size, self.shard)

    def whole(self, hidden: Tensor) -> Tensor:
        return all_gather(hidden, self.region.group) if self.region.sequence_parallel else hidden


def become(module: torch.nn.Module, kind: type[torch.nn.Module], **attributes: Any) -> None:
    """Turn a plain module into its parallel version, a subclass of its own class."""
    assert issubclass(kind, type(module)), f"{kind.__name__} is no parallel version of {type(module).__name__}"
    module.__class__ = kind
    for name, value in attributes.items():
        setattr(module, name, value)
