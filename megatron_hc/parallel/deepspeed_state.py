"""Where DeepSpeed keeps master weights, moments and gradients: flat buffers, of which a parameter has a run here.

Stages 1 and 2 lay all parameters of a group one behind the other and give every data-parallel rank an equal run of
that; stage 3 gives every rank an equal run of each parameter. DeepSpeed has no public way to these buffers that would
not gather whole parameters, so this file, and no other, knows the attributes of its optimizers (0.19).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_hc.optim import adamw_step


class Fragment(NamedTuple):
    """A run of a parameter's elements in a buffer."""

    buffer: int
    first: int
    """In the buffer."""
    start: int
    """In the parameter, flattened."""
    length: int

    def of(self, buffers: Sequence[Tensor]) -> Tensor:
        """The run, a view."""
        return buffers[self.buffer].narrow(0, self.first, self.length)


class ShardedState:
    """The buffers of one of DeepSpeed's optimizers, around the optimizer ``base`` that it was given."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.base = optimizer, optimizer.optimizer
        for flat in self._masters():
            # Before DeepSpeed's optimizers make it at their first step: a checkpoint may be loaded into it.
            self.base.state[flat] = {"step": 0} | {
                name: torch.zeros_like(flat, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")
            }

    @property
    def buffers(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Master weights and both moments."""
        flats = self._masters()
        first, second = ([self.base.state[flat][name] for flat in flats] for name in ("exp_avg", "exp_avg_sq"))
        return [flat.detach() for flat in flats], first, second

    def _masters(self) -> list[Tensor]:
        """The flat fp32 weights of this rank: leaves, by which ``base`` knows its state."""
        raise NotImplementedError

    def fragment(self, parameter: nn.Parameter) -> Fragment:
        """This rank's run of a parameter; its length is 0 where the rank has none."""
        raise NotImplementedError

    def gradients(self) -> list[Tensor]:
        """The mean over data-parallel ranks, once a step's last backward pass is done: what ``step`` will use."""
        raise NotImplementedError

    def forget_gradients(self) -> None:
        """Before a step's first pass: what a parameter without a gradient would keep of the last one."""
        raise NotImplementedError

    def update_parameters(self) -> None:
        """Round the master weights into the parameters, on all ranks."""
        raise NotImplementedError


class WholeParameters(ShardedState):
    """Stages 1 and 2: every rank has all parameters."""

    def _masters(self) -> list[Tensor]:
        return self.optimizer.single_partition_of_fp32_groups

    def fragment(self, parameter: nn.Parameter) -> Fragment:
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return Fragment(0, 0, 0, 0)
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Fragment(mapping.param_group_index, here.start, there.start, here.numel)

    def gradients(self) -> list[Tensor]:
        if self.optimizer.cpu_offload:
            self.optimizer._wait_for_offload_copies()
            return _gradients_of(self._masters())
        averaged, found = self.optimizer.averaged_gradients, []
        for index in range(len(self._masters())):  # they came in the order of the backward pass
            parts = averaged[index]
            flat = getattr(parts, "flat_partition", None)
            if flat is None:  # a list of pieces, which its step would join: as one piece it takes what is done to it
                size = int(self.optimizer.partition_size[index])
                flat = self.optimizer.flatten_dense_tensors_aligned(parts, size)
                averaged[index] = [flat]
            found.append(flat)
        return found

    def forget_gradients(self) -> None:
        if self.optimizer.cpu_offload:
            for gradient in _gradients_of(self._masters()):
                gradient.zero_()

    def update_parameters(self) -> None:
        self.optimizer.update_lp_params()


class PartitionedParameters(ShardedState):
    """Stage 3: of every parameter a rank has its run only."""

    def _masters(self) -> list[Tensor]:
        return self.optimizer.fp32_partitioned_groups_flat

    def fragment(self, parameter: nn.Parameter) -> Fragment:
        zero: Any = parameter
        buffer, first, size = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        start = min(size * torch.distributed.get_rank(self.optimizer.dp_process_group), zero.ds_numel)
        return Fragment(buffer, first, start, min(size, zero.ds_numel - start))

    def gradients(self) -> list[Tensor]:
        if self.optimizer.offload_optimizer:
            return _gradients_of(self._masters())
        sizes = [flat.numel() for flat in self._masters()]
        return list(self.optimizer.grad_partitions_flat_buffer.split(sizes))

    def forget_gradients(self) -> None:
        self.optimizer.grad_partitions_flat_buffer.zero_()
        if self.optimizer.offload_optimizer:
            for gradient in _gradients_of(self._masters()):
                gradient.zero_()

    def update_parameters(self) -> None:
        self.optimizer._partition_all_parameters()
        for index in range(len(self._masters())):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(index)
        # Small parameters stay whole between the steps: fetched anew.
        persistent = self.optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)


def _gradients_of(flats: Sequence[Tensor]) -> list[Tensor]:
    """Of an offloaded optimizer, which keeps them from step to step."""
    return [flat.grad for flat in flats if flat.grad is not None]


def sharded_state(optimizer: Any) -> ShardedState:
    """Of the optimizer that DeepSpeed has made."""
    is_stage_3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    return PartitionedParameters(optimizer) if is_stage_3 else WholeParameters(optimizer)


class FlatAdamW(torch.optim.Optimizer):
    """AdamW as everywhere here (``optim/adamw.py``), in the form that DeepSpeed takes; it calls ``step`` by group."""

    def __init__(self, groups: Sequence[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "eps": 0.0, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for flat in group["params"]:
                state = self.state[flat]
                state["step"] += 1
                adamw_step(
                    [flat],
                    [flat.grad],
                    [state["exp_avg"]],
                    [state["exp_avg_sq"]],
                    step=state["step"],
                    lr=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                )
