"""Data parallelism: fp32 gradients, master weights and AdamW state, shared out over the data-parallel ranks (ZeRO-1).

Every rank sums its micro-batches' gradients in fp32. Once a step these sums are reduce-scattered: of each parameter a
rank gets the sum over all ranks for its own rows, updates its master weights there, and gathers the others' new
weights. With one rank its rows are all rows; the code is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_hc.config import OptimizerConfig, ParallelConfig
from megatron_hc.kernels.norm import promote
from megatron_hc.mesh import Mesh
from megatron_hc.optim import AdamUpdate, ParameterGroup, adamw_step, clip_coefficient, grad_norm_squared, num_zeros
from megatron_hc.parallel.collectives import all_reduce
from megatron_hc.parallel.gather import ParameterGatherer
from megatron_hc.parallel.gradients import GradientReducer
from megatron_hc.parallel.placement import Placement
from megatron_hc.parallel.slots import Sharding, Slot, buckets_of, expert_sharding_of, local, sharding_of


class StepStats(NamedTuple):
    """What a step reports."""

    grad_norm: float
    """Global gradient norm before clipping."""
    num_zeros: int | None
    """Zeros in the gradient, where asked for."""


class DataParallelOptimizer:
    """AdamW on fp32 master weights, with gradients summed over micro-batches and ranks in fp32.

    Made from the fp32 initial values, before ``cast_parameters``. ``dtypes`` and ``placed`` by parameter name;
    ``users``: the modules that wait for their parameters themselves under --overlap-param-gather. ``update``: what
    updates masters and moments, ``adamw_step`` or another package's kernel.

    A step: ``begin``, forward and backward passes, ``reduce_gradients``, ``grad_norm``, ``step``.
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        config: OptimizerConfig,
        parallel: ParallelConfig,
        mesh: Mesh,
        dtypes: Mapping[str, torch.dtype],
        placed: Mapping[str, Placement],
        users: Iterable[nn.Module] = (),
        update: AdamUpdate = adamw_step,
    ) -> None:
        self.config, self.mesh, self.update = config, mesh, update
        self.num_steps = 0
        self.sharding = sharding_of(parallel, mesh)
        self.expert_sharding = expert_sharding_of(parallel, mesh)
        self.offloads = parallel.optimizer_cpu_offload
        self.slots = [
            self._slot(name, parameter, dtypes[name], placed[name], group)
            for group in groups
            for name, parameter in group["params"]
        ]
        self.fully_sharded = [slot for slot in self.slots if slot.is_fully_sharded]
        self.reducers, self.gatherers, users = [], [], list(users)
        for is_expert, sharding in ((False, self.sharding), (True, self.expert_sharding)):
            slots = [slot for slot in self.slots if slot.placement.is_expert == is_expert]
            whole = [slot for slot in slots if not slot.is_fully_sharded]
            buckets = list(buckets_of(whole, parallel.ddp_bucket_size))
            self.reducers.append(GradientReducer(buckets, sharding, parallel.overlap_grad_reduce))
            self.gatherers.append(ParameterGatherer(buckets, sharding, parallel.overlap_param_gather, users))

    def _slot(
        self, name: str, parameter: nn.Parameter, dtype: torch.dtype, placement: Placement, group: ParameterGroup
    ) -> Slot:
        value = parameter.detach()
        assert value.dtype == promote(dtype), f"{name}: master weights are taken before the cast to {dtype}"
        is_fully_sharded = local(value) is not value
        rows = self._sharding_of(placement).rows(value.shape[0])
        own = local(value) if is_fully_sharded else value[rows[0] : rows[1]]
        assert own.shape[0] == rows[1] - rows[0], f"{name}: {tuple(own.shape)} is not rows {rows}"
        is_apart = self.offloads or not is_fully_sharded and value.dtype != dtype
        master = own.to("cpu" if self.offloads else own.device, copy=True) if is_apart else own
        return Slot(
            name,
            parameter,
            # FSDP2 casts where it gathers: the parameter itself stays wide.
            value.dtype if is_fully_sharded else dtype,
            placement,
            group["weight_decay"],
            group["lr_mult"],
            rows,
            master,
            torch.zeros_like(master),
            torch.zeros_like(master),
            is_apart=is_apart,
            is_fully_sharded=is_fully_sharded,
            eps_mult=group["eps_mult"],
        )

    def _sharding_of(self, placement: Placement) -> Sharding:
        return self.expert_sharding if placement.is_expert else self.sharding

    def begin(self, num_micro_batches: int) -> None:
        """Forget the last step's gradients; that many backward passes follow."""
        for reducer in self.reducers:
            reducer.begin(num_micro_batches)
        for slot in self.fully_sharded:
            slot.parameter.grad = slot.grad = None
        for gatherer in self.gatherers:
            gatherer.wait_outside()

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Sum over data-parallel ranks, then over tensor-parallel ranks where the table says so."""
        for reducer in self.reducers:
            reducer.finish()
        for slot in self.fully_sharded:
            grad = slot.parameter.grad
            slot.grad = torch.zeros_like(local(slot.parameter.detach())) if grad is None else local(grad)
        self._sum_partial()

    def _sum_partial(self) -> None:
        """After the data-parallel sum, on this rank's rows: so a bucket can start while gradients are still coming."""
        parts: dict[tuple[str, torch.dtype, torch.device], list[Tensor]] = {}
        for slot in self.slots:
            name = slot.placement.sum_over
            if name is not None and self.mesh.group(name) is not None:
                for holders, part in _pieces(slot, slot.grad):
                    if holders > 1:
                        parts.setdefault((name, part.dtype, part.device), []).append(part)
        for (name, _, _), grads in parts.items():
            flat = torch.cat([grad.flatten() for grad in grads]).to(self.mesh.device)
            all_reduce(flat, self.mesh.group(name))
            for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(total.view_as(grad))

    @torch.no_grad()
    def grad_norm(self) -> float:
        """Norm of the step's gradient over all parameters of the whole model, each element counted once."""
        return float(self._total(grad_norm_squared, (slot.grad for slot in self.slots)) ** 0.5)

    @torch.no_grad()
    def params_norm(self) -> float:
        """Norm of all weights of the whole model."""
        return float(self._total(grad_norm_squared, (slot.master for slot in self.slots)) ** 0.5)

    @torch.no_grad()
    def layer_grad_norms(self, num_layers: int) -> list[float]:
        """Norm of the step's gradient of each layer's parameters, over the whole model, before clipping."""
        names = [slot.name.split(".") for slot in self.slots]
        rows = [int(name[1]) if name[0] == "layers" else num_layers for name in names]
        totals = self._totals(grad_norm_squared, (slot.grad for slot in self.slots), rows, num_layers + 1)
        return totals[:num_layers].sqrt().tolist()

    def _num_zeros(self) -> int:
        """fp32 counts to 2^24 only."""
        return round(float(self._total(num_zeros, (slot.grad for slot in self.slots), torch.float64)))

    def _total(self, measure: object, tensors: Iterable[Tensor | None], dtype: torch.dtype | None = None) -> Tensor:
        """Sum of ``measure`` over the whole model: what h ranks hold counts 1 / h on each."""
        return self._totals(measure, tensors, [0] * len(self.slots), 1, dtype)[0]

    def _totals(
        self,
        measure: object,
        tensors: Iterable[Tensor | None],
        rows: Sequence[int],
        num_rows: int,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """``_total`` in several parts [num_rows]; ``rows``: which one each slot counts in. ``dtype``: the masters'."""
        assert callable(measure)
        by_holders: dict[tuple[bool, int, int, torch.device], list[Tensor]] = {}
        for slot, tensor, row in zip(self.slots, tensors, rows, strict=True):
            for holders, part in _pieces(slot, tensor):
                by_holders.setdefault((slot.placement.is_expert, row, holders, part.device), []).append(part)
        # What the ranks of a tensor-parallel group are to a dense parameter, those of a block are to an expert's.
        dtype = dtype or promote(self.slots[0].master.dtype)
        totals = torch.zeros(2, num_rows, dtype=dtype, device=self.mesh.device)
        for (is_expert, row, holders, _), parts in by_holders.items():
            totals[int(is_expert), row] += measure(parts) / holders
        for total, sharding, axis in zip(
            totals.unbind(), (self.sharding, self.expert_sharding), ("tp", "experts"), strict=True
        ):
            all_reduce(all_reduce(total, sharding.group), self.mesh.group(axis))
        return all_reduce(totals.sum(0), self.mesh.group("pp"))

    @torch.no_grad()
    def step(self, grad_norm: float, learning_rate: float, weight_decay: float, count_zeros: bool = False) -> StepStats:
        """Clip and update: ``learning_rate`` and ``weight_decay`` are this step's, times the group's multipliers."""
        self.num_steps += 1
        zeros = self._num_zeros() if count_zeros else None
        self._update(clip_coefficient(grad_norm, self.config.clip_grad), learning_rate, weight_decay)
        return StepStats(grad_norm, zeros)

    def _update(self, clip: float, learning_rate: float, weight_decay: float) -> None:
        """New weights, from gradients times ``clip``."""
        self._adamw(self.slots, clip, learning_rate, weight_decay)
        self.update_parameters()

    def _adamw(self, slots: Iterable[Slot], clip: float, learning_rate: float, weight_decay: float) -> None:
        """AdamW on the master weights."""
        kinds: dict[tuple[bool, float, float, torch.dtype], list[Slot]] = {}
        for slot in slots:
            if slot.master.numel() > 0:
                kinds.setdefault((slot.decays, slot.lr_mult, slot.eps_mult, slot.master.dtype), []).append(slot)
        for (decays, lr_mult, eps_mult, _), alike in kinds.items():
            grads = [slot.grad for slot in alike if slot.grad is not None]
            if clip < 1.0:
                torch._foreach_mul_(grads, clip)
            self.update(
                [slot.master for slot in alike],
                [grad.to(slot.master.device) for slot, grad in zip(alike, grads, strict=True)],
                [slot.exp_avg for slot in alike],
                [slot.exp_avg_sq for slot in alike],
                step=self.num_steps,
                lr=learning_rate * lr_mult,
                betas=(self.config.adam_beta1, self.config.adam_beta2),
                eps=self.config.adam_eps * eps_mult,
                weight_decay=weight_decay if decays else 0.0,
            )

    @torch.no_grad()
    def update_parameters(self) -> None:
        """Round the master weights into the parameters and gather the other ranks' (after a step, and after a load)."""
        for slot in self.slots:
            if slot.is_apart:
                slot.own_rows.copy_(slot.master)
        for gatherer in self.gatherers:
            gatherer.start()

    def wait_for_parameters(self) -> None:
        """Have all parameters up to date: before anything but a training step reads them."""
        for gatherer in self.gatherers:
            gatherer.wait()


def _pieces(slot: Slot, tensor: Tensor | None) -> Iterable[tuple[int, Tensor]]:
    """(number of tensor-parallel holders, their part) of a tensor with this rank's rows of a parameter; views."""
    assert tensor is not None, "reduce_gradients comes first"
    for box in slot.boxes(tensor):
        for piece, _, values in slot.placement.overlaps(box):
            yield piece.holders, values
