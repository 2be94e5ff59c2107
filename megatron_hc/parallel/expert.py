"""Expert parallelism: experts on several processes, and the tokens on their way to them.

The ranks of a stage form blocks of neighbours (mesh group 'experts'); a block holds every expert once, and each expert
may be cut over a few of its ranks (expert tensor parallelism). A rank's tokens go to the experts of its block.

Dims: T tokens of this rank, k experts per token, N rows, E experts, P ranks of the block, C hidden size.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hc.mesh import ExpertRanks, Mesh
from megatron_hc.model.experts import Rows, arrange, combine, dispatch, weights_of_rows
from megatron_hc.model.gpt import GPT
from megatron_hc.model.moe import MoE
from megatron_hc.model.router import LOSS_NAMES, Router, Routing, Step, TokenGroup, routers_of
from megatron_hc.parallel.collectives import (
    Group,
    all_gather,
    all_reduce,
    exchange_rows,
    gather_sequence,
    group_size,
    own_part,
    reduce_scatter_sequence,
)
from megatron_hc.parallel.tensor import become


class MeshTokens(TokenGroup):
    """Tokens of a micro-batch on the ranks of a tensor- and context-parallel group, in the order of its ranks."""

    def __init__(self, mesh: Mesh) -> None:
        self.group, self.stage = mesh.group("tp_cp"), mesh.group("stage")
        self.num_parts = mesh.size("tp") * mesh.size("cp")
        self.part = mesh.rank("cp") * mesh.size("tp") + mesh.rank("tp")
        self.batch_ranks, self.batch_rank = mesh.size("dp"), mesh.rank("dp")

    def gather(self, x: Tensor) -> Tensor:
        return all_gather(x, self.group)

    def own(self, x: Tensor) -> Tensor:
        return own_part(x, self.group)

    def sum(self, x: Tensor) -> Tensor:
        return all_reduce(x.clone(), self.group)

    def sum_over_batches(self, x: Tensor) -> Tensor:
        return all_reduce(x.clone(), self.stage)


class _Reorder(torch.autograd.Function):
    """x[order], where ``inverse`` undoes ``order``: its adjoint is the other way round, a gather again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.inverse), None, None


class Exchange(NamedTuple):
    """Who gets which rows."""

    blocks: list[int]
    """Rows for each expert rank of the block, in order."""
    received: list[int]
    """Rows from each rank of the block."""
    order: Tensor
    """[received rows] sorts them by expert."""
    inverse: Tensor
    """[received rows] puts them back in the order in which they came."""
    counts: Tensor
    """[experts here] rows of each."""
    parts: int
    """Ranks that share an expert: each gets the rows."""
    group: Group

    @property
    def sent(self) -> list[int]:
        return [size for size in self.blocks for _ in range(self.parts)]

    def go(self, rows: Tensor) -> Tensor:
        """[N, ...] sorted by expert -> the rows for the experts here, sorted by expert."""
        rows = rows[: sum(self.blocks)]
        if self.parts > 1:
            rows = torch.cat([block for block in rows.split(self.blocks) for _ in range(self.parts)])
        return _Reorder.apply(exchange_rows(rows, self.sent, self.received, self.group), self.order, self.inverse)

    def come_back(self, rows: Tensor) -> Tensor:
        """The way back of what the experts here made; what ranks that share an expert made is added."""
        unsorted = _Reorder.apply(rows, self.inverse, self.order)
        back = exchange_rows(unsorted, self.received, self.sent, self.group)
        if self.parts == 1:
            return back
        blocks = back.split(self.sent)
        sums = [torch.stack(blocks[first : first + self.parts]).sum(0) for first in range(0, len(blocks), self.parts)]
        return torch.cat(sums)


class SpreadMoE(MoE):
    """A branch whose experts are on the ranks of a block."""

    group: Group
    where: ExpertRanks

    @property
    def num_local(self) -> int:
        return self.num_experts // self.where.ranks

    @property
    def first_local(self) -> int:
        return self.where.rank * self.num_local

    def trimmed(self, rows: Rows) -> Rows:
        """On a CPU without the rows of nobody, but for one where there are no others; that waits for the counts."""
        if rows.counts.is_cuda:
            return rows
        size = max(int(rows.counts.sum()), 1)
        assert rows.has_pair is not None
        return rows._replace(
            pairs=rows.pairs[:size], places=rows.places.clamp(max=size - 1), has_pair=rows.has_pair[:size]
        )


class AllToAllMoE(SpreadMoE):
    """Every row goes to the rank(s) of its expert and back.

    The sizes are exchanged first and read by the host; with --moe-pad-expert-input-to-capacity they are fixed.
    """

    def routed(self, x: Tensor, routing: Routing) -> Tensor:
        rows = arrange(routing.experts, routing.kept, self.num_experts, routing.num_slots)
        exchange = self.exchange(rows, routing.num_slots)
        weights = exchange.go(weights_of_rows(routing.weights, rows))
        y = self.experts(exchange.go(dispatch(x, rows, self.topk)), weights, exchange.counts)
        back = exchange.come_back(y)
        missing = rows.pairs.shape[0] - back.shape[0]  # rows of dropped choices went nowhere
        return combine(F.pad(back, (0, 0, 0, missing)), rows, self.topk)

    def exchange(self, rows: Rows, num_slots: int | None) -> Exchange:
        size, own = group_size(self.group), slice(self.first_local, self.first_local + self.num_local)
        if num_slots is None:
            everyone = all_gather(rows.counts.unsqueeze(0), self.group).cpu()  # [P, E]
        else:
            everyone = torch.full((size, self.num_experts), num_slots)
        mine = everyone[(self.where.rank * self.where.parts + self.where.part)]
        here = everyone[:, own]  # [P, experts here]
        received = here.sum(1).tolist()
        experts = torch.arange(self.num_local).repeat(size).repeat_interleave(here.flatten())
        order = experts.sort(stable=True).indices
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0]))
        device = rows.counts.device
        return Exchange(
            blocks=mine.unflatten(0, (self.where.ranks, -1)).sum(1).tolist(),
            received=received,
            order=order.to(device, non_blocking=True),
            inverse=inverse.to(device, non_blocking=True),
            counts=here.sum(0).to(device, non_blocking=True),
            parts=self.where.parts,
            group=self.group,
        )


class AllGatherMoE(SpreadMoE):
    """All tokens go to all ranks of the block, each runs its experts, and the results are reduce-scattered.

    More traffic than all-to-all unless a token has about as many experts as the block has ranks; no size depends on
    the routing, so on a GPU the host waits for nothing.
    """

    def routed(self, x: Tensor, routing: Routing) -> Tensor:
        tokens = gather_sequence(x, self.group)  # [P * T, C]
        weights = gather_sequence(routing.weights, self.group)
        experts = all_gather(routing.experts, self.group) - self.first_local
        is_here = (experts >= 0) & (experts < self.num_local)
        if routing.kept is not None:
            is_here &= all_gather(routing.kept.to(torch.uint8), self.group).bool()
        slots = None if routing.num_slots is None else routing.num_slots * group_size(self.group)
        rows = arrange(experts, is_here, self.num_local, slots)
        if slots is None:
            rows = self.trimmed(rows)
        y = self.experts(dispatch(tokens, rows, self.topk), weights_of_rows(weights, rows), rows.counts)
        return reduce_scatter_sequence(combine(y, rows, self.topk), self.group)


class SameTokensMoE(SpreadMoE):
    """All ranks of the block have the same tokens, as in a tensor-parallel group without sequence parallelism.

    Each runs its experts on them, and the results are added. For reading and writing text: no gradients.
    """

    def routed(self, x: Tensor, routing: Routing) -> Tensor:
        experts = routing.experts - self.first_local
        is_here = (experts >= 0) & (experts < self.num_local)
        rows = arrange(experts, is_here, self.num_local, None)
        rows = self.trimmed(rows)
        y = self.experts(dispatch(x, rows, self.topk), weights_of_rows(routing.weights, rows), rows.counts)
        return all_reduce(combine(y, rows, self.topk).contiguous(), self.group)


def _routers(model: GPT) -> list[Router]:
    """A dense model is not searched: that takes longer than some of its kernels."""
    return [] if model.config.moe.num_experts is None else routers_of([model])


def begin_step(model: GPT, mesh: Mesh, *, seed: int, iteration: int, num_micro_batches: int) -> None:
    """Before the step after ``iteration``, of ``num_micro_batches`` on each data-parallel rank."""
    for router in _routers(model):
        router.step = Step(f"{seed}/{iteration}", 1 / (num_micro_batches * mesh.size("dp")))


@torch.no_grad()
def finish_step(model: GPT, mesh: Mesh) -> dict[str, list[float | None]]:
    """After a step: move the expert biases; losses of the routers by name and layer, None for layers without experts.

    Divided by their coefficients, so that 1 is balanced; averaged over micro-batches. The same on every rank; all ranks
    call together.
    """
    options, num_layers = model.config.moe, model.config.num_layers
    kinds = [*LOSS_NAMES.items(), ("z_loss", "z_loss")]
    names = [
        name for kind, name in kinds if (options.moe_z_loss_coeff if kind == "z_loss" else options.aux_loss_coeff(kind))
    ]
    sums = torch.zeros(len(names), num_layers, dtype=torch.float64, device=mesh.device)
    for router in _routers(model):
        router.move_bias()
        for row, name in enumerate(names):
            if name in router.step.losses:
                sums[row, router.layer] = router.step.losses[name] * router.step.loss_share
    if not names:
        return {}
    has_experts = options.has_experts(num_layers)
    values = all_reduce(sums, mesh.group("world")).tolist()
    return {
        name: [value if has else None for value, has in zip(row, has_experts, strict=True)]
        for name, row in zip(names, values, strict=True)
    }


DISPATCHERS: dict[str, type[SpreadMoE]] = {"alltoall": AllToAllMoE, "allgather": AllGatherMoE}


def spread_experts(model: GPT, mesh: Mesh, dispatcher: Literal["alltoall", "allgather"]) -> None:
    """Tell routers who shares their micro-batch, and turn branches into those whose experts are on several ranks."""
    for module in list(model.modules()):
        if not isinstance(module, MoE):
            continue
        if mesh.group("stage") is not None:
            module.router.tokens = MeshTokens(mesh)
        module.experts.num_experts = module.num_experts // mesh.experts.ranks
        module.experts.adds_bias = mesh.experts.part == 0
        if mesh.group("experts") is not None:
            has_same_tokens = mesh.size("tp") > 1 and not mesh.sequence_parallel
            kind = SameTokensMoE if has_same_tokens else DISPATCHERS[dispatcher]
            become(module, kind, group=mesh.group("experts"), where=mesh.experts)
