"""The step's gradients over data-parallel ranks: one reduction per bucket and global batch, early if so wished."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_hc.parallel.collectives import all_reduce, start_all_reduce, start_reduce_scatter
from megatron_hc.parallel.slots import Bucket, Sharding, Slot, columns_of, scatter_rows


class GradientReducer:
    """Sums gradients over micro-batches (hooks) and over data-parallel ranks (buckets).

    With ``overlap`` a bucket's reduction starts as soon as the last micro-batch's gradients of all its parameters have
    arrived, while the backward pass goes on. Buckets start in their own order whatever the order of arrival, so that
    every rank issues the same collectives in the same order; a parameter without a gradient only delays. The sums are
    the same numbers in both modes.
    """

    def __init__(self, buckets: Sequence[Bucket], sharding: Sharding, overlap: bool) -> None:
        self.buckets, self.sharding = buckets, sharding
        self.overlap = overlap and (sharding.group is not None or sharding.replicas is not None)
        self.num_micro_batches = 0
        self._started: list[tuple[Tensor, Any]] = []
        for index, bucket in enumerate(buckets):
            for slot in bucket:
                if slot.is_mixed or self.overlap:
                    slot.parameter.register_post_accumulate_grad_hook(self._hook(index, slot))

    def begin(self, num_micro_batches: int) -> None:
        """Forget the last step's gradients; ``num_micro_batches`` backward passes follow."""
        self.num_micro_batches = num_micro_batches
        self._started.clear()
        for bucket in self.buckets:
            for slot in bucket:
                slot.parameter.grad = slot.main_grad = slot.grad = None
                slot.arrivals = 0
                if slot.is_fused:
                    slot.prepare_fusion()

    def _hook(self, index: int, slot: Slot) -> Any:
        def arrived(parameter: Tensor) -> None:
            assert index >= len(self._started), f"{slot.name} got a gradient after its bucket was reduced"
            if slot.is_mixed:
                slot.accumulate()
            slot.arrivals += 1
            if self.overlap and slot.arrivals == self.num_micro_batches * slot.placement.passes:
                self._start_complete()

        return arrived

    def _start_complete(self) -> None:
        while len(self._started) < len(self.buckets):
            bucket = self.buckets[len(self._started)]
            if any(slot.arrivals < self.num_micro_batches * slot.placement.passes for slot in bucket):
                return
            self._started.append(self._start(bucket))

    @torch.no_grad()
    def _start(self, bucket: Bucket) -> tuple[Tensor, Any]:
        """Start a bucket's first reduction: (its result, once waited for; what to wait for)."""
        sharding, first = self.sharding, bucket[0]
        if sharding.group is None:
            flat = torch.cat([slot.local_gradient.flatten() for slot in bucket])
            return start_all_reduce(flat, sharding.replicas)
        elements = sum(slot.shard_elements(sharding.shards) for slot in bucket)
        flat = first.parameter.new_zeros((sharding.shards, elements), dtype=first.master.dtype)
        for slot, columns in columns_of(bucket, flat, sharding.shards):
            scatter_rows(slot.local_gradient, columns)
        return start_reduce_scatter(flat, sharding.group)

    @torch.no_grad()
    def finish(self) -> None:
        """Reduce what has not been started, wait for the rest, and leave every slot its ``grad``."""
        if self.sharding.group is None and self.sharding.replicas is None:
            for bucket in self.buckets:
                for slot in bucket:
                    slot.grad = slot.local_gradient
            return
        for index, bucket in enumerate(self.buckets):
            flat, work = self._started[index] if index < len(self._started) else self._start(bucket)
            if work is not None:
                work.wait()
            self._hand_out(bucket, flat)
        self._started.clear()

    def _hand_out(self, bucket: Bucket, flat: Tensor) -> None:
        if self.sharding.group is None:
            for slot, part in zip(bucket, flat.split([slot.parameter.numel() for slot in bucket]), strict=True):
                slot.grad = part.view_as(slot.parameter)
            return
        all_reduce(flat, self.sharding.replicas)
        for slot, columns in columns_of(bucket, flat, self.sharding.shards):
            slot.grad = columns.flatten()[: slot.master.numel()].view_as(slot.master)
