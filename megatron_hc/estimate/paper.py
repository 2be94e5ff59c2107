"""A rank of a layout on paper: its model without storage, its groups without processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from megatron_hc.config import TrainConfig
from megatron_hc.estimate.boundaries import Moved, fused_boundaries
from megatron_hc.kernels.norm import WIDEST_IN_TRITON
from megatron_hc.mesh import Mesh, mesh_of
from megatron_hc.model.attention import CoreAttention, heads_apart
from megatron_hc.model.experts import ExpertMatrix, Experts, Rows
from megatron_hc.model.linear import NormLayer
from megatron_hc.model.router import Router
from megatron_hc.parallel.collectives import CountedGroup, all_gather, group_size
from megatron_hc.parallel.expert import AllGatherMoE, AllToAllMoE, Exchange
from megatron_hc.parallel.placement import Placement
from megatron_hc.parallel.plan import (
    build_model,
    compute_dtype,
    owned_parameters,
    parallelize,
    parameter_dtype,
    placements,
)
from megatron_hc.parallel.stages import WaitingWeights
from megatron_hc.parallel.tensor import become
from megatron_hc.pipeline_layout import ZERO_BUBBLE_SCHEDULES


class PaperRank:
    """One rank: ``model``, ``placed`` and ``mesh`` as a run has them, and what its groups have ``sent``."""

    def __init__(self, config: TrainConfig, world_size: int, rank: int, vocab_size: int, device: str = "cuda") -> None:
        """``device``: the kind of machine it stands for; on GPUs some sizes do not follow the routing of tokens."""
        self.config, self.rank = config, rank
        self.sent: Counter[tuple[str, str]] = Counter()
        self.mesh = self._mesh(world_size)
        self.model = build_model(config, vocab_size, self.mesh)
        self.placed = placements(self.model, self.mesh)
        with torch.no_grad():
            self._materialize()
        parallelize(self.model, self.mesh)
        self._stand_in(device)
        self.waiting = WaitingWeights()
        """Where a zero-bubble schedule's weight gradients wait."""
        if config.parallel.pipeline_layout(config.model.num_layers).schedule in ZERO_BUBBLE_SCHEDULES:
            self.waiting.serve(self.model.modules())

    @cached_property
    def fused_boundaries(self) -> dict[int, Moved]:
        """As ``boundaries.fused_boundaries`` has them."""
        return fused_boundaries(self.model, compute_dtype(self.config).itemsize)

    def _mesh(self, world_size: int) -> Mesh:
        if world_size == 1:
            return Mesh(device="meta")
        names = iter(range(1 << 30))

        def join(members: list[list[int]]) -> CountedGroup | None:
            own: list[int] = next((ranks for ranks in members if self.rank in ranks), [])
            name = str(next(names))
            return CountedGroup(name, len(own), own.index(self.rank), self.sent) if len(own) > 1 else None

        mesh = mesh_of(self.rank, world_size, self.config, "meta", join)
        for name, group in mesh.groups.items():
            if group is not None and group.name.isdigit():  # joined under a number; 'dp_cp' may be 'dp' once more
                group.name = name
        return mesh

    def _materialize(self) -> None:
        """``materialize`` and ``cast_parameters`` of a run, without numbers."""
        dtype = compute_dtype(self.config)
        for name, module, local_name in list(owned_parameters(self.model)):
            parameter = module._parameters[local_name]
            assert parameter is not None
            own = self.placed[name].cut(parameter).to(parameter_dtype(module, dtype))
            module._parameters[local_name] = nn.Parameter(own)

    def _stand_in(self, device: str) -> None:
        """What looks at numbers, or is another kernel on each device, gets a form that has sizes only."""
        for module in self.model.modules():
            if isinstance(module, CoreAttention):
                become(module, PaperAttention, is_cpu=device == "cpu")
            elif type(module) is NormLayer and device != "cpu":
                become(module, PaperNorm)
            elif isinstance(module, Router):
                become(module, PaperRouter)
            elif isinstance(module, Experts):
                become(module, PaperExperts)
            elif isinstance(module, AllToAllMoE):
                become(module, PaperAllToAll)
            elif isinstance(module, AllGatherMoE):
                become(module, PaperAllGather, trims=device == "cpu")

    def parameters(self) -> list[tuple[str, nn.Parameter, Placement]]:
        """(name, this rank's part, its place) of every parameter."""
        return [(name, parameter, self.placed[name]) for name, parameter in self.model.named_parameters()]


class _FlashAttention(torch.autograd.Function):
    """Keeps what flash attention keeps: query, key, value, output and a number per query and head in fp32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32)))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


class PaperAttention(CoreAttention):
    """Flash attention by its sizes; with --attention-softmax-in-fp32 the explicit form as it is."""

    is_cpu: bool

    def arranged(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(heads_apart(x) for x in tensors) if self.is_cpu else tensors

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if self.softmax_in_fp32:
            return super().forward(q, k, v, mask)
        heads_first = (1, 2, 0, 3)
        y = _FlashAttention.apply(*(t.permute(heads_first) for t in (q, k, v)))
        return y.permute(2, 0, 1, 3).flatten(2)


class _NormInTriton(torch.autograd.Function):
    """Keeps what the kernel keeps: its input as it is, and two numbers per row in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, *parameters, x.new_empty((2, x.numel() // x.shape[-1]), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:-1])


class PaperNorm(NormLayer):
    """The norm as a GPU has it, by itself or behind the plain residual's sum, which the kernel keeps no second time."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > WIDEST_IN_TRITON or x.dtype == torch.float64:
            return super().forward(x)
        parameters = (self.weight,) if self.bias is None else (self.weight, self.bias)
        return _NormInTriton.apply(x, *parameters)


class PaperRouter(Router):
    """Chooses without looking at numbers."""

    def choose(self, logits: Tensor) -> Tensor:
        if self.has_sinkhorn and self.training:
            logits = self.tokens.own(self.tokens.gather(logits))
        return logits.new_empty((logits.shape[0], self.options.moe_router_topk), dtype=torch.int64)

    def _jittered(self, x: Tensor, call: int) -> Tensor:
        return x * torch.empty_like(x)


class PaperExperts(Experts):
    """All products in one, whatever the experts' shares."""

    def grouped(self, x: Tensor, matrix: ExpertMatrix, counts: Tensor) -> Tensor:
        return _GroupedProduct.apply(x, matrix.stacked(self.num_experts))


class _GroupedProduct(torch.autograd.Function):
    """x [N, in], weight [E, in, out] -> [N, out], by sizes: N rows, each through one expert."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        product = x.t() @ grads[0]  # the experts' products together have these rows
        return grads[0] @ weight[0].t(), torch.empty_like(weight, dtype=product.dtype)


class PaperAllGather(AllGatherMoE):
    """Experts share tokens evenly."""

    trims: bool

    def trimmed(self, rows: Rows) -> Rows:
        if not self.trims:
            return rows
        size = max(1, rows.pairs.shape[0] // self.where.ranks)
        assert rows.has_pair is not None
        return rows._replace(pairs=rows.pairs[:size], has_pair=rows.has_pair[:size])


class PaperAllToAll(AllToAllMoE):
    """Experts share tokens evenly."""

    def exchange(self, rows: Rows, num_slots: int | None) -> Exchange:
        ranks, parts = self.where.ranks, self.where.parts
        if num_slots is None:
            all_gather(rows.counts.unsqueeze(0), self.group)
        blocks = _even(rows.pairs.shape[0], ranks)
        received = [blocks[self.where.rank]] * group_size(self.group)
        total = sum(received)
        return Exchange(
            blocks=blocks,
            received=received,
            order=rows.pairs.new_empty(total),
            inverse=rows.pairs.new_empty(total),
            counts=rows.counts[: self.num_local],
            parts=parts,
            group=self.group,
        )


def _even(total: int, parts: int) -> list[int]:
    return [total // parts + (part < total % parts) for part in range(parts)]


def stage_ranks(config: TrainConfig, world_size: int) -> Sequence[int]:
    """One rank of each pipeline process: the first of its stage."""
    size = config.parallel.pipeline_model_parallel_size
    return [rank * (world_size // size) for rank in range(size)]
